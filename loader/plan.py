"""What goes where: a pure function from a model's footprint and a budget to a Plan. No torch.

When the budget is short, things are given up in this order, and none that the user fixed:

1. what the KV pool has beyond one full context (fewer long conversations run at once; short ones still do);
2. the prefill chunk: 2048 tokens, halved down to 256 (a long prompt is then read in more steps);
3. the context, when none was asked for: from 8192 tokens down to 2048, in steps of 256;
4. the prefill chunk again, down to 64;
5. resident weights: MLP matrices from the last layer to the first, then attention projections, then an untied
   lm_head, at the very last an untied embedding. When little has to go, smaller modules alone may do, because
   they need less staging; where a large one has to go at the end, some that went before it could have stayed.
   Chunks are 256 tokens again where they go in, for each chunk reads all offloaded weights once. Norms,
   buffers and tied embeddings always stay.

Weights come last because moving a tenth of them off the device about doubles the time of every token, while
the others cost nothing until somebody needs them. What a smaller chunk frees does not go to the pool: a
larger budget would then have the smaller pool. Concurrency is the number of rows of a step, which costs only
logits, so it is never given up; a pool for as many full contexts is the most that is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from loader.batching import CONTINUOUS, ONE_AT_A_TIME, why_one_at_a_time
from loader.budget import STARTUP_BYTES, MemoryBudget
from loader.checkpoint import ModelSpec
from loader.device_map import accelerate_device, device_map
from loader.errors import BudgetExceeded
from loader.footprint import Footprint, measure
from loader.kv_layout import KvLayout
from loader.placement import CPU_RESERVE_BYTES, DevicePlan, Placement, Placer, Setting
from loader.plan_request import CONTEXT_STEP, PlanRequest, check_request, contexts_of
from loader.plan_words import full_pool, given_up, hint, longest_context, notes

__all__ = ["CONTINUOUS", "CPU_RESERVE_BYTES", "ONE_AT_A_TIME", "DevicePlan", "Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """The whole decision, before a byte of weights is read. `load(plan)` carries it out and nothing else."""

    spec: ModelSpec
    budget: MemoryBudget
    family: str
    exact: bool
    dtype: str
    weights_bytes: int
    resident_bytes: int  # on the devices that compute
    offloaded_bytes: int  # to RAM or disk, copied in and out every step
    kv_bytes_per_token: int
    batching: str  # CONTINUOUS | ONE_AT_A_TIME
    kv: KvLayout  # the pool; of a model that runs one at a time a stand-in, in which its own cache is counted
    context: int  # tokens of one request, at most
    concurrency: int  # rows of one step, at most: so many requests run at once
    chunk_tokens: int  # of one step, at most, of all its rows together
    device_map: dict[str, int | str]  # accelerate's form
    max_memory: dict[int | str, int]  # accelerate's form: bytes that weights may take on each device
    devices: tuple[DevicePlan, ...]
    given_up: tuple[str, ...] = ()  # in the order it was given up, sentences for a person
    notes: tuple[str, ...] = field(default=())
    startup_bytes: int = STARTUP_BYTES  # held before loading; beside the budget, not inside it

    @property
    def kv_tokens(self) -> int:
        """That the pool holds at the same time, of all requests."""
        return self.kv.tokens

    @property
    def main_device(self) -> str:
        return self.devices[0].device

    @property
    def streamed_bytes_per_token(self) -> int:
        """What a decode step copies into the main device: the hooks bring in every offloaded module once."""
        return self.offloaded_bytes

    def to_json(self) -> dict[str, Any]:
        """Everything but the headers, for programs: JSON types only, keys are strings."""
        same = (
            "family", "exact", "dtype", "weights_bytes", "resident_bytes", "offloaded_bytes",
            "kv_bytes_per_token", "kv_tokens", "batching", "context", "concurrency", "chunk_tokens",
            "startup_bytes", "streamed_bytes_per_token",
        )  # fmt: skip
        return {
            "model": self.spec.source,
            "fits": True,
            **{name: getattr(self, name) for name in same},
            "kv": _layout_json(self.kv),
            "device_map": self.device_map,
            "max_memory": {str(device): n_bytes for device, n_bytes in self.max_memory.items()},
            "devices": [
                {**asdict(d), "peak_bytes": d.peak_bytes, "free_bytes": d.free_bytes} for d in self.devices
            ],
            "given_up": list(self.given_up),
            "notes": list(self.notes),
        }


def _layout_json(layout: KvLayout) -> dict[str, Any]:
    groups = [{**asdict(group), "layers": list(group.layers)} for group in layout.groups]
    return {"block_tokens": layout.block_tokens, "groups": groups}


def make_plan(
    spec: ModelSpec,
    budget: MemoryBudget,
    context: int | None = None,
    concurrency: int | None = None,
    dtype: str = "auto",
) -> Plan:
    """Decide what goes where; milliseconds, and no device is touched.

    `context` is in tokens of one request, `concurrency` the requests that run at the same time at most; the
    pool has room for one full context at least. Raises BadPlanRequest for a context, concurrency or dtype
    that the model cannot have, UnsupportedModel when config.json does not say how big the model is, and
    BudgetExceeded, with the smallest budget that would do, when nothing in the order above makes it fit.
    """
    footprint = measure(spec, dtype)
    alone = why_one_at_a_time(spec, footprint.shape, contexts_of(footprint, context)[0])
    request = check_request(footprint, budget, context, concurrency, alone)
    placer = Placer(footprint, budget, request.continuous)
    limit = budget.limits[budget.compute[0]]
    placement = _resident(placer, request, limit)
    if placement is not None:
        placement = _with_more_context(placer, request, limit, placement)
        placement = _with_more_pool(placer, request, limit, placement)
    else:
        placement = _offloaded(placer, request, limit)
    if placement is None:
        raise _misfit(footprint, budget, placer, request)
    return _plan(spec, budget, footprint, placer, request, placement)


def _resident(placer: Placer, request: PlanRequest, limit: int) -> Placement | None:
    tried = (placer.resident(setting, limit) for setting in request.resident_settings())
    return next((placement for placement in tried if placement), None)


def _with_more_context(placer: Placer, request: PlanRequest, limit: int, placement: Placement) -> Placement:
    """Gives back what the coarse steps of context took too much of; the chunk stays.

    Not what a smaller chunk has freed: a larger budget would then have the shorter context.
    """
    setting, wanted = placement.setting, request.contexts[0]
    if request.context_is_fixed or setting.context == wanted or setting.chunk < request.usual_chunk:
        return placement
    longest = longest_context(placer, setting, limit, wanted) // CONTEXT_STEP * CONTEXT_STEP
    more = Setting(setting.chunk, max(longest, setting.context), setting.concurrency)
    return placer.resident(more, limit) or placement


def _with_more_pool(placer: Placer, request: PlanRequest, limit: int, placement: Placement) -> Placement:
    """The largest pool that fits, up to a full context for each row, where nothing else was given up."""
    setting = placement.setting
    if not request.continuous or setting != next(request.resident_settings()):
        return placement
    most = full_pool(placer, setting)
    if all_of_it := placer.resident(most, limit):
        return all_of_it
    fits, beyond = placer.pool.blocks(setting), most.blocks or 0
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        larger = placer.resident(replace(setting, blocks=middle), limit)
        if larger:
            fits, placement = middle, larger
        else:
            beyond = middle
    return placement


def _offloaded(placer: Placer, request: PlanRequest, limit: int) -> Placement | None:
    tried = (placer.offloaded(setting, limit) for setting in request.offload_settings())
    return next((placement for placement in tried if placement), None)


def _misfit(
    footprint: Footprint, budget: MemoryBudget, placer: Placer, request: PlanRequest
) -> BudgetExceeded:
    """The refusal, with the exact smallest budget of the main device: one byte less is refused again."""
    main = budget.compute[0]
    have = budget.limits[main]
    need = _smallest(lambda limit: _resident(placer, request, limit) is not None, have)
    smallest = _smallest(lambda limit: _offloaded(placer, request, limit) is not None, have)
    return BudgetExceeded(
        main, need, have, min(need, smallest), hint(footprint, budget, request),
        footprint.weights_bytes, footprint.kv_bytes_per_token,
    )  # fmt: skip


def _smallest(fits: Callable[[int], bool], too_small: int) -> int:
    """The smallest limit that fits; `fits` is false up to some limit and true from there on."""
    low, high = too_small, max(2 * too_small, 1 << 20)
    while not fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _plan(
    spec: ModelSpec,
    budget: MemoryBudget,
    footprint: Footprint,
    placer: Placer,
    request: PlanRequest,
    placement: Placement,
) -> Plan:
    setting, moved = placement.setting, placement.offload.n_bytes
    return Plan(
        spec=spec,
        budget=budget,
        family=footprint.family,
        exact=footprint.exact,
        dtype=footprint.dtype,
        weights_bytes=footprint.weights_bytes,
        resident_bytes=footprint.weights_bytes - moved,
        offloaded_bytes=moved,
        kv_bytes_per_token=footprint.kv_bytes_per_token,
        batching=CONTINUOUS if request.continuous else ONE_AT_A_TIME,
        kv=placer.pool.layout(setting),
        context=setting.context,
        concurrency=setting.concurrency,
        chunk_tokens=setting.chunk,
        device_map=device_map(placement.places),
        max_memory=_max_memory(budget, placement),
        devices=placement.devices,
        given_up=tuple(given_up(placer, request, placement)),
        notes=tuple(notes(footprint, budget, placer, request, placement)),
    )


def _max_memory(budget: MemoryBudget, placement: Placement) -> dict[int | str, int]:
    """What remains for weights when everything else has its share; 0 on a device that is not used."""
    used = {d.device: d.budget_bytes - d.peak_bytes + d.weights_bytes for d in placement.devices}
    idle = {device: 0 if device in budget.compute else n_bytes for device, n_bytes in budget.limits.items()}
    return {accelerate_device(device): n_bytes for device, n_bytes in (idle | used).items()}
