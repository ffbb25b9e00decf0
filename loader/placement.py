"""Puts a model's units on devices for one chunk, context and pool, or finds that they do not go in. No torch.

On a GPU, weights that do not fit are offloaded to RAM within its limit, then to disk; on the CPU, to disk.
"disk" means that a module is read from the checkpoint's own shards each time it runs: nothing is written.
Whatever is offloaded runs on the main device, the first of the budget's compute devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from loader.budget import MemoryBudget
from loader.footprint import Footprint, LayerCache, WeightUnit
from loader.offload import Offload, Offloader
from loader.pool import PoolRule, rule_for

MiB = 2**20
# torch's caching allocator rounds to 512 bytes and takes segments of 2 and 20 MiB from CUDA.
CUDA_SLACK_BYTES = 64 * MiB
CUDA_SLACK_PERCENT = 5  # of activations
# What the driver keeps for graphs, and cuBLAS' workspace on their stream: on an H100, 7 graphs of 28 layers
# took 8 to 13 MB with our kernels and 32 without.
CUDA_GRAPHS_BYTES = 64 * MiB
# malloc's arenas, oneDNN's scratch memory and the thread pool's stacks.
CPU_RESERVE_BYTES = 40 * MiB


@dataclass(frozen=True, slots=True)
class Setting:
    """What the fixed part of memory depends on."""

    chunk: int  # tokens of one step
    context: int  # tokens of one sequence
    concurrency: int  # rows of one step, and sequences that run
    blocks: int | None = None  # of the KV group that sees the furthest; None: what one sequence needs


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What fills one device's budget, all in bytes."""

    device: str  # "cuda:0" | "cpu" | "disk"
    budget_bytes: int
    weights_bytes: int  # resident
    kv_bytes: int
    activation_bytes: int
    logits_bytes: int
    staging_bytes: int  # what offload hooks hold while an offloaded module runs
    reserve_bytes: int  # CUDA context, graphs and allocator slack, or the CPU allocator's

    @property
    def peak_bytes(self) -> int:
        return (
            self.weights_bytes + self.kv_bytes + self.activation_bytes
            + self.logits_bytes + self.staging_bytes + self.reserve_bytes
        )  # fmt: skip

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.peak_bytes


@dataclass(frozen=True)
class Placement:
    """Where every module is, and what that makes of each device."""

    setting: Setting
    places: dict[str, str]  # module -> "cuda:0" | "cpu" | "disk", in execution order
    devices: tuple[DevicePlan, ...]  # those in use: compute in pipeline order, then "cpu", then "disk"
    offload: Offload


@dataclass(frozen=True)
class _Piece:
    """Units that stay on one compute device: the embedding, a layer, or the last norm and the head."""

    units: tuple[WeightUnit, ...]
    cache: LayerCache | None = None

    @cached_property
    def weights_bytes(self) -> int:
        return sum(unit.n_bytes for unit in self.units)

    @cached_property
    def has_head(self) -> bool:
        return any(unit.kind == "head" for unit in self.units)


@dataclass
class _Stage:
    """What one compute device holds while it is being filled."""

    device: str
    limit: int
    setting: Setting
    pieces: list[_Piece] = field(default_factory=list)
    weights_bytes: int = 0
    kv_bytes: int = 0
    logits_bytes: int = 0

    @property
    def units(self) -> list[WeightUnit]:
        return [unit for piece in self.pieces for unit in piece.units]


class Placer:
    """Answers for one model and one kind of budget; the main device's limit may change between questions.

    `continuous`: requests share a pool of KV blocks and every step; else one runs with the model's own cache.
    """

    def __init__(self, footprint: Footprint, budget: MemoryBudget, continuous: bool = True) -> None:
        self.pool: PoolRule = rule_for(footprint.layers, continuous, budget.compute[0])
        self._footprint = footprint
        self._budget = budget
        self._main = budget.compute[0]
        self._first, self._layers, self._last = _pieces(footprint)
        self._offloaders: dict[int, Offloader] = {}
        self._working: dict[tuple[int, int, int, str], tuple[int, int]] = {}
        self._kv: dict[Setting, dict[LayerCache, int]] = {}

    def resident(self, setting: Setting, main_limit: int) -> Placement | None:
        """Everything on the compute devices, filled in pipeline order; None when it does not fit."""
        stages = self._stages(setting, main_limit)
        self._add(stages[0], self._first)
        at = 0
        for piece in (*self._layers, self._last):
            while not self._takes(stages[at], piece):
                at += 1
                if at == len(stages):
                    return None
            self._add(stages[at], piece)
        if self._room(stages[0]) < 0:
            return None
        return self._placement(stages, Offload(()))

    def offloaded(self, setting: Setting, main_limit: int) -> Placement | None:
        """The other devices filled from the last layer back; the main one holds and offloads what remains."""
        stages = self._stages(setting, main_limit)
        left = [*self._layers, self._last]
        at = len(stages) - 1
        while left and at > 0:
            if self._takes(stages[at], left[-1]):
                self._add(stages[at], left.pop())
            else:
                at -= 1
        main = stages[0]
        for piece in (self._first, *left):
            self._add(main, piece)
        for choice in self._offloader(main).choices(self._room(main) + main.weights_bytes):
            if self._has_place_for(choice):
                return self._placement(stages, choice)
        return None

    # One compute device

    def _stages(self, setting: Setting, main_limit: int) -> list[_Stage]:
        limits = {**self._budget.limits, self._main: main_limit}
        return [_Stage(device, limits[device], setting) for device in self._budget.compute]

    def _takes(self, stage: _Stage, piece: _Piece) -> bool:
        logits = self._logits_bytes(piece, stage.setting)
        kv = self._kv_bytes(piece, stage.setting)
        return piece.weights_bytes + kv + logits <= self._room(stage)

    def _add(self, stage: _Stage, piece: _Piece) -> None:
        stage.pieces.append(piece)
        stage.weights_bytes += piece.weights_bytes
        stage.kv_bytes += self._kv_bytes(piece, stage.setting)
        stage.logits_bytes += self._logits_bytes(piece, stage.setting)

    def _kv_bytes(self, piece: _Piece, setting: Setting) -> int:
        if setting not in self._kv:
            kinds = set(self._footprint.layers)
            self._kv[setting] = {layer: self.pool.layer_bytes(layer, setting) for layer in kinds}
        return self._kv[setting][piece.cache] if piece.cache else 0

    def _logits_bytes(self, piece: _Piece, setting: Setting) -> int:
        return self._footprint.logits_bytes(setting.concurrency) if piece.has_head else 0

    def _room(self, stage: _Stage) -> int:
        """Bytes that are still free; negative when the device holds too much."""
        activations, reserve = self._working_bytes(stage)
        return stage.limit - activations - reserve - stage.weights_bytes - stage.kv_bytes - stage.logits_bytes

    def _working_bytes(self, stage: _Stage) -> tuple[int, int]:
        """(activations, reserve) of a device that computes."""
        setting, device = stage.setting, stage.device
        key = setting.chunk, setting.context, setting.concurrency, device
        if key not in self._working:
            activations = self.activation_bytes(setting, device != "cpu")
            self._working[key] = activations, self._reserve_bytes(setting, device, activations)
        return self._working[key]

    def _reserve_bytes(self, setting: Setting, device: str, activations: int) -> int:
        if device == "cpu":
            return CPU_RESERVE_BYTES
        reserve = gpu_reserve(activations, self._budget.context_bytes)
        # Only a model that is whole on one GPU has graphs. They are counted wherever that could be, so that
        # what fits stays so when the budget grows.
        if not self.pool.continuous or device != self._main:
            return reserve
        rows = setting.concurrency
        graphs = self._footprint.graph_bytes(rows, setting.context, self.pool.block_tokens)
        return reserve + graphs + CUDA_GRAPHS_BYTES

    def activation_bytes(self, setting: Setting, gpu: bool) -> int:
        """The worst moment of a step."""
        if not self.pool.continuous:
            return self._footprint.activation_bytes(setting.chunk, setting.context, gpu)
        return self._footprint.packed_activation_bytes(
            setting.chunk, setting.context, setting.concurrency, self.pool.block_tokens, gpu
        )

    # Where offloaded weights go

    def _offloader(self, stage: _Stage) -> Offloader:
        layers = len(stage.pieces)  # which pieces the main device has is told by their number
        if layers not in self._offloaders:
            self._offloaders[layers] = Offloader(stage.units)
        return self._offloaders[layers]

    def _limit(self, device: str) -> int:
        """Bytes that may be offloaded there."""
        return self._budget.offload_bytes(device, self._footprint.weights_bytes)

    def _ram_room(self) -> int:
        return max(self._limit("cpu") - CPU_RESERVE_BYTES, 0)

    def _has_place_for(self, choice: Offload) -> bool:
        """RAM alone, or RAM and disk; a module from disk passes through RAM on its way to a GPU."""
        if choice.n_bytes <= self._ram_room():
            return True
        if self._main == "cpu":
            return choice.n_bytes <= self._limit("disk")
        room = self._ram_room() - choice.staging_bytes
        # Filling RAM module by module may leave the size of the largest one unused.
        return room >= 0 and choice.n_bytes - max(room - choice.staging_bytes, 0) <= self._limit("disk")

    def _spread(self, choice: Offload) -> tuple[list[WeightUnit], list[WeightUnit]]:
        """(to RAM, to disk): RAM takes what it can, in the order in which units were given up."""
        room = self._ram_room()
        if choice.n_bytes > room:
            room = max(room - choice.staging_bytes, 0)
        ram: list[WeightUnit] = []
        disk: list[WeightUnit] = []
        for unit in choice.units:
            fits = unit.n_bytes <= room
            (ram if fits else disk).append(unit)
            room -= unit.n_bytes if fits else 0
        return ram, disk

    # The whole

    def _placement(self, stages: Sequence[_Stage], choice: Offload) -> Placement:
        ram, disk = self._spread(choice)
        moved = {unit.module: "cpu" for unit in ram} | {unit.module: "disk" for unit in disk}
        homes = {unit.module: stage.device for stage in stages for unit in stage.units} | moved
        places = {unit.module: homes[unit.module] for unit in self._footprint.units}
        devices = [self._device_plan(stage, choice) for stage in stages if stage.pieces]
        return Placement(stages[0].setting, places, (*devices, *self._stores(ram, disk)), choice)

    def _device_plan(self, stage: _Stage, choice: Offload) -> DevicePlan:
        activations, reserve = self._working_bytes(stage)
        is_main = stage.device == self._main
        return DevicePlan(
            device=stage.device,
            budget_bytes=stage.limit,
            weights_bytes=stage.weights_bytes - (choice.n_bytes if is_main else 0),
            kv_bytes=stage.kv_bytes,
            activation_bytes=activations,
            logits_bytes=stage.logits_bytes,
            staging_bytes=choice.staging_bytes if is_main else 0,
            reserve_bytes=reserve,
        )

    def _stores(self, ram: list[WeightUnit], disk: list[WeightUnit]) -> Iterator[DevicePlan]:
        on_gpu = self._main != "cpu"
        if on_gpu and (ram or disk):
            passing = max((unit.n_bytes for unit in disk), default=0)
            kept = sum(unit.n_bytes for unit in ram)
            yield DevicePlan("cpu", self._limit("cpu"), kept, 0, 0, 0, passing, CPU_RESERVE_BYTES)
        if disk:
            yield DevicePlan("disk", self._limit("disk"), sum(unit.n_bytes for unit in disk), 0, 0, 0, 0, 0)


def gpu_reserve(activation_bytes: int, context_bytes: int) -> int:
    return context_bytes + CUDA_SLACK_BYTES + activation_bytes * CUDA_SLACK_PERCENT // 100


def _pieces(footprint: Footprint) -> tuple[_Piece, list[_Piece], _Piece]:
    """(embedding and buffers, the layers, last norm and head); a tied head stays with its embedding."""
    layers: dict[int, list[WeightUnit]] = {i: [] for i in range(len(footprint.layers))}
    first: list[WeightUnit] = []
    last: list[WeightUnit] = []
    for unit in footprint.units:
        if unit.layer in layers:
            layers[unit.layer].append(unit)
        elif unit.kind in ("norm", "head") and unit.tied_to is None:
            last.append(unit)
        else:
            first.append(unit)
    pieces = [_Piece(tuple(units), footprint.layers[i]) for i, units in layers.items()]
    return _Piece(tuple(first)), pieces, _Piece(tuple(last))
