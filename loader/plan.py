"""What goes where: a pure function from a model's footprint and a budget to a Plan. No torch.

When the budget is short, things are given up in this order, and none that the user fixed:

1. the prefill chunk: 2048 tokens, halved down to 256 (a long prompt is then read in more steps);
2. the context, when none was asked for: from 8192 tokens down to 2048, in steps of 256;
3. the prefill chunk again, down to 64;
4. resident weights: MLP matrices from the last layer to the first, then attention projections, then an untied
   lm_head, at the very last an untied embedding. When little has to go, smaller modules alone may do, because
   they need less staging; where a large one has to go at the end, some that went before it could have stayed.
   Chunks are 256 tokens again where they go in, for each chunk reads all offloaded weights once. Norms,
   buffers and tied embeddings always stay.

Weights come last because moving a tenth of them off the device about doubles the time of every token, while
the others cost nothing until somebody needs them. Concurrency is 1 unless asked for, so there is none to give
up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from loader.budget import MemoryBudget, format_bytes
from loader.checkpoint import ModelSpec
from loader.device_map import accelerate_device, device_map
from loader.errors import BadPlanRequest, BudgetExceeded
from loader.footprint import Footprint, measure
from loader.placement import CPU_RESERVE_BYTES, DevicePlan, Placement, Placer, Setting

__all__ = ["CPU_RESERVE_BYTES", "DevicePlan", "Plan", "make_plan"]

CHUNKS = (2048, 1024, 512, 256)
OFFLOAD_CHUNK = CHUNKS[-1]
SMALL_CHUNKS = (128, 64)
DEFAULT_CONTEXT = 8192
SHORTER_CONTEXTS = (4096, 2048)
CONTEXT_STEP = 256
DEFAULT_CONCURRENCY = 1
# Resident memory of the process before it loads a model: Python, torch for CPU and the model's class.
STARTUP_BYTES = 420 * 2**20


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
    kv_tokens: int  # context * concurrency
    context: int
    concurrency: int
    chunk_tokens: int
    device_map: dict[str, int | str]  # accelerate's form
    max_memory: dict[int | str, int]  # accelerate's form: bytes that weights may take on each device
    devices: tuple[DevicePlan, ...]
    given_up: tuple[str, ...] = ()  # in the order it was given up, sentences for a person
    notes: tuple[str, ...] = field(default=())
    startup_bytes: int = STARTUP_BYTES  # held before loading; beside the budget, not inside it

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
            "kv_bytes_per_token", "kv_tokens", "context", "concurrency", "chunk_tokens", "startup_bytes",
            "streamed_bytes_per_token",
        )  # fmt: skip
        return {
            "model": self.spec.source,
            "fits": True,
            **{name: getattr(self, name) for name in same},
            "device_map": self.device_map,
            "max_memory": {str(device): n_bytes for device, n_bytes in self.max_memory.items()},
            "devices": [
                {**asdict(d), "peak_bytes": d.peak_bytes, "free_bytes": d.free_bytes} for d in self.devices
            ],
            "given_up": list(self.given_up),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class _Request:
    """What was asked for, checked."""

    contexts: tuple[int, ...]  # the wanted one first
    context_is_fixed: bool
    concurrency: int

    def resident_settings(self) -> Iterator[Setting]:
        """From the best to the least, as long as all weights stay."""
        yield from (self._setting(chunk, self.contexts[0]) for chunk in CHUNKS)
        yield from (self._setting(CHUNKS[-1], context) for context in self.contexts[1:])
        yield from (self._setting(chunk, self.contexts[-1]) for chunk in SMALL_CHUNKS)

    def offload_settings(self) -> Iterator[Setting]:
        yield from (self._setting(chunk, self.contexts[-1]) for chunk in (OFFLOAD_CHUNK, *SMALL_CHUNKS))

    def _setting(self, chunk: int, context: int) -> Setting:
        return Setting(min(chunk, context), context, self.concurrency)


def make_plan(
    spec: ModelSpec,
    budget: MemoryBudget,
    context: int | None = None,
    concurrency: int | None = None,
    dtype: str = "auto",
) -> Plan:
    """Decide what goes where; milliseconds, and no device is touched.

    `context` is in tokens for each of `concurrency` requests that run at the same time. Raises BadPlanRequest
    for a context, concurrency or dtype that the model cannot have, UnsupportedModel when config.json does not
    say how big the model is, and BudgetExceeded, with the smallest budget that would do, when nothing in the
    order above makes it fit.
    """
    footprint = measure(spec, dtype)
    request = _checked(footprint, context, concurrency)
    placer = Placer(footprint, budget)
    limit = budget.limits[budget.compute[0]]
    placement = _resident(placer, request, limit)
    if placement is not None:
        placement = _with_more_context(placer, request, limit, placement)
    else:
        placement = _offloaded(placer, request, limit)
    if placement is None:
        raise _misfit(footprint, budget, placer, request)
    return _plan(spec, budget, footprint, placer, request, placement)


def _checked(footprint: Footprint, context: int | None, concurrency: int | None) -> _Request:
    longest = footprint.max_context
    if context is not None and not 1 <= context <= longest:
        raise BadPlanRequest(f"context of {context:,} tokens: this model takes 1 to {longest:,}")
    if concurrency is not None and concurrency < 1:
        raise BadPlanRequest(f"concurrency of {concurrency:,}: at least 1 request must run")
    if context is not None:
        contexts = [context]
    else:
        contexts = sorted({min(c, longest) for c in (DEFAULT_CONTEXT, *SHORTER_CONTEXTS)}, reverse=True)
    return _Request(tuple(contexts), context is not None, concurrency or DEFAULT_CONCURRENCY)


def _resident(placer: Placer, request: _Request, limit: int) -> Placement | None:
    tried = (placer.resident(setting, limit) for setting in request.resident_settings())
    return next((placement for placement in tried if placement), None)


def _with_more_context(placer: Placer, request: _Request, limit: int, placement: Placement) -> Placement:
    """Gives back what the coarse steps of context took too much of; the chunk stays.

    Not what a smaller chunk has freed: a larger budget would then have the shorter context.
    """
    setting, wanted = placement.setting, request.contexts[0]
    if request.context_is_fixed or setting.context == wanted or setting.chunk in SMALL_CHUNKS:
        return placement
    longest = _longest_context(placer, setting, limit, wanted) // CONTEXT_STEP * CONTEXT_STEP
    more = Setting(setting.chunk, max(longest, setting.context), setting.concurrency)
    return placer.resident(more, limit) or placement


def _offloaded(placer: Placer, request: _Request, limit: int) -> Placement | None:
    tried = (placer.offloaded(setting, limit) for setting in request.offload_settings())
    return next((placement for placement in tried if placement), None)


def _misfit(footprint: Footprint, budget: MemoryBudget, placer: Placer, request: _Request) -> BudgetExceeded:
    """The refusal, with the exact smallest budget of the main device: one byte less is refused again."""
    main = budget.compute[0]
    have = budget.limits[main]
    need = _smallest(lambda limit: _resident(placer, request, limit) is not None, have)
    smallest = _smallest(lambda limit: _offloaded(placer, request, limit) is not None, have)
    return BudgetExceeded(
        main, need, have, min(need, smallest), _hint(footprint, budget, request),
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


def _hint(footprint: Footprint, budget: MemoryBudget, request: _Request) -> str:
    """What else the user could change."""
    ways = []
    if request.context_is_fixed and request.contexts[0] > SHORTER_CONTEXTS[-1]:
        ways.append(f"a shorter --context (each token takes {footprint.kv_bytes_per_token:,} bytes)")
    if request.concurrency > 1:
        ways.append(f"a --concurrency below {request.concurrency}")
    # What is read from disk for a GPU passes through RAM.
    place = "disk" if budget.compute[0] == "cpu" else "cpu"
    if not budget.offload_bytes(place, footprint.weights_bytes):
        ways.append("a place for weights that do not fit, such as --max-memory with cpu=…,disk=…")
    if footprint.dtype == "float32":
        ways.append("--dtype bfloat16, which halves it")
    kept = "Embeddings that are also the lm_head cannot be offloaded. " if footprint.shape.tied else ""
    ways.append("a smaller model" if ways else "Take a smaller model")
    return kept + (f"Or give it {', '.join(ways[:-1])}, or {ways[-1]}." if len(ways) > 1 else f"{ways[0]}.")


def _plan(
    spec: ModelSpec,
    budget: MemoryBudget,
    footprint: Footprint,
    placer: Placer,
    request: _Request,
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
        kv_tokens=setting.context * setting.concurrency,
        context=setting.context,
        concurrency=setting.concurrency,
        chunk_tokens=setting.chunk,
        device_map=device_map(placement.places),
        max_memory=_max_memory(budget, placement),
        devices=placement.devices,
        given_up=tuple(_given_up(footprint, request, placement)),
        notes=tuple(_notes(footprint, budget, placer, request, placement)),
    )


def _max_memory(budget: MemoryBudget, placement: Placement) -> dict[int | str, int]:
    """What remains for weights when everything else has its share; 0 on a device that is not used."""
    used = {d.device: d.budget_bytes - d.peak_bytes + d.weights_bytes for d in placement.devices}
    idle = {device: 0 if device in budget.compute else n_bytes for device, n_bytes in budget.limits.items()}
    return {accelerate_device(device): n_bytes for device, n_bytes in (idle | used).items()}


def _given_up(footprint: Footprint, request: _Request, placement: Placement) -> Iterator[str]:
    wanted, got = next(request.resident_settings()), placement.setting
    if got.chunk < min(wanted.chunk, got.context):
        before = footprint.activation_bytes(wanted.chunk, got.context)
        freed = format_bytes(before - footprint.activation_bytes(got.chunk, got.context))
        yield f"prefill chunk: {wanted.chunk:,} -> {got.chunk:,} tokens, which frees {freed}"
    if got.context < wanted.context:
        before = footprint.kv_bytes(wanted.context, got.chunk) * got.concurrency
        freed = format_bytes(before - footprint.kv_bytes(got.context, got.chunk) * got.concurrency)
        yield f"context: {wanted.context:,} -> {got.context:,} tokens, which frees {freed} of KV cache"
    if placement.offload.units:
        moved = placement.offload
        yield (
            f"resident weights: {len(moved.units)} modules, {format_bytes(moved.n_bytes)} in all, are copied "
            f"in at every step through {format_bytes(moved.staging_bytes)} of staging"
        )


def _notes(
    footprint: Footprint, budget: MemoryBudget, placer: Placer, request: _Request, placement: Placement
) -> Iterator[str]:
    if not footprint.exact:
        yield (
            f"model_type {footprint.family!r} is not in the table of families: KV cache and activations are "
            "estimated as those of a usual transformer, activations with a quarter more."
        )
    used = {plan.device for plan in placement.devices}
    for device in budget.compute:
        if device not in used:
            yield f"{device} is not used: the model goes in without it, or no layer fits there."
    setting = placement.setting
    if not request.context_is_fixed and setting.context == request.contexts[0]:
        longest = _longest_context(placer, setting, budget.limits[budget.compute[0]], footprint.max_context)
        if longest > setting.context:
            yield f"{longest:,} tokens of context would fit: ask for them with --context {longest}."


def _longest_context(placer: Placer, setting: Setting, limit: int, highest: int) -> int:
    """The longest context that the same chunk size leaves room for."""
    fits, beyond = setting.context, highest + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if placer.resident(Setting(setting.chunk, middle, setting.concurrency), limit):
            fits = middle
        else:
            beyond = middle
    return fits
