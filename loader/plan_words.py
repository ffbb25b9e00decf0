"""What a plan says to a person: what was given up, what else there is to know, what would help."""

from __future__ import annotations

from collections.abc import Iterator

from loader.budget import MemoryBudget, format_bytes
from loader.footprint import Footprint
from loader.placement import Placement, Placer, Setting
from loader.plan_request import SHORTER_CONTEXTS, PlanRequest


def given_up(placer: Placer, request: PlanRequest, placement: Placement) -> Iterator[str]:
    """In the order in which it was given up."""
    wanted, got = next(request.resident_settings()), placement.setting
    if request.asked_concurrency is not None and request.continuous:
        yield from _smaller_pool(placer, got)
    if got.chunk < min(wanted.chunk, got.context):
        before = placer.activation_bytes(wanted, gpu=False)
        freed = format_bytes(before - placer.activation_bytes(_with_chunk(wanted, got.chunk), gpu=False))
        yield f"prefill chunk: {wanted.chunk:,} -> {got.chunk:,} tokens, which frees {freed}"
    if got.context < wanted.context:
        before = placer.pool.n_bytes(Setting(got.chunk, wanted.context, got.concurrency))
        freed = format_bytes(before - placer.pool.n_bytes(got))
        yield f"context: {wanted.context:,} -> {got.context:,} tokens, which frees {freed} of KV cache"
    if placement.offload.units:
        moved = placement.offload
        yield (
            f"resident weights: {len(moved.units)} modules, {format_bytes(moved.n_bytes)} in all, are copied "
            f"in at every step through {format_bytes(moved.staging_bytes)} of staging"
        )


def _with_chunk(setting: Setting, chunk: int) -> Setting:
    return Setting(chunk, setting.context, setting.concurrency)


def _smaller_pool(placer: Placer, got: Setting) -> Iterator[str]:
    """Of the user's own number of conversations, how many are held."""
    most = full_pool(placer, got)
    wanted, kept = (placer.pool.layout(setting).tokens for setting in (most, got))
    if kept < wanted:
        freed = format_bytes(placer.pool.n_bytes(most) - placer.pool.n_bytes(got))
        yield f"KV pool: {wanted:,} -> {kept:,} tokens, which frees {freed}: {_conversations(placer, got)}"


def full_pool(placer: Placer, setting: Setting) -> Setting:
    """With room for as many full contexts as there are rows."""
    blocks = setting.concurrency * placer.pool.least_blocks(setting.context, setting.chunk)
    return Setting(setting.chunk, setting.context, setting.concurrency, blocks)


def _conversations(placer: Placer, setting: Setting) -> str:
    count = placer.pool.blocks(setting) // placer.pool.least_blocks(setting.context, setting.chunk)
    many = f"{count} conversations" if count > 1 else "one conversation"
    return f"{many} of {setting.context:,} at once, more when they are shorter"


def notes(
    footprint: Footprint, budget: MemoryBudget, placer: Placer, request: PlanRequest, placement: Placement
) -> Iterator[str]:
    """What is neither a number of the plan nor given up."""
    if not footprint.exact:
        yield (
            f"model_type {footprint.family!r} is not in the table of families: KV cache and activations are "
            "estimated as those of a usual transformer, activations with a quarter more."
        )
    if request.alone:
        asked = request.asked_concurrency or 1
        instead = f", not {asked:,} together" if asked > 1 else ""
        yield (
            f"{footprint.family} {request.alone}: requests run one at a time{instead}, with the model's own "
            "cache."
        )
    used = {plan.device for plan in placement.devices}
    for device in budget.compute:
        if device not in used:
            yield f"{device} is not used: the model goes in without it, or no layer fits there."
    yield from _pool_note(placer, request, placement.setting)
    setting = placement.setting
    if not request.context_is_fixed and setting.context == request.contexts[0]:
        longest = longest_context(placer, setting, budget.limits[budget.compute[0]], footprint.max_context)
        if longest > setting.context:
            yield f"{longest:,} tokens of context would fit: ask for them with --context {longest}."


def _pool_note(placer: Placer, request: PlanRequest, setting: Setting) -> Iterator[str]:
    if not request.continuous or request.asked_concurrency is not None:
        return
    if placer.pool.blocks(setting) < (full_pool(placer, setting).blocks or 0):
        tokens = placer.pool.layout(setting).tokens
        yield f"KV pool: {tokens:,} tokens: {_conversations(placer, setting)}."


def longest_context(placer: Placer, setting: Setting, limit: int, highest: int) -> int:
    """The longest context for which the same chunk leaves room, once."""
    fits, beyond = setting.context, highest + 1
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        if placer.resident(Setting(setting.chunk, middle, setting.concurrency), limit):
            fits = middle
        else:
            beyond = middle
    return fits


def hint(footprint: Footprint, budget: MemoryBudget, request: PlanRequest) -> str:
    """What else the user of a model that does not fit could change."""
    ways = []
    if request.context_is_fixed and request.contexts[0] > SHORTER_CONTEXTS[-1]:
        ways.append(f"a shorter --context (each token takes {footprint.kv_bytes_per_token:,} bytes)")
    if request.asked_concurrency is not None and request.concurrency > 1:
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
