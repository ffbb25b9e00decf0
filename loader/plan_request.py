"""What a plan was asked for, and the settings that are tried for it, from the best to the least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loader.budget import MemoryBudget
from loader.errors import BadPlanRequest
from loader.footprint import Footprint
from loader.placement import Setting

CHUNKS = (2048, 1024, 512, 256)
OFFLOAD_CHUNK = CHUNKS[-1]
SMALL_CHUNKS = (128, 64)
DEFAULT_CONTEXT = 8192
SHORTER_CONTEXTS = (4096, 2048)
CONTEXT_STEP = 256
# Rows of a step. Decoding reads all weights for one row or for sixteen; a GPU can do more in that time.
CPU_CONCURRENCY, CUDA_CONCURRENCY = 16, 64


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What was asked for, checked."""

    contexts: tuple[int, ...]  # the wanted one first
    context_is_fixed: bool
    concurrency: int
    asked_concurrency: int | None  # what the user gave
    alone: str | None  # why requests run one at a time, after the family's name

    @property
    def continuous(self) -> bool:
        return self.alone is None

    @property
    def usual_chunk(self) -> int:
        """What a chunk is cut down to before anything else is given up."""
        return self._setting(CHUNKS[-1], self.contexts[-1]).chunk

    def resident_settings(self) -> Iterator[Setting]:
        """From the best to the least, as long as all weights stay."""
        yield from (self._setting(chunk, self.contexts[0]) for chunk in CHUNKS)
        yield from (self._setting(CHUNKS[-1], context) for context in self.contexts[1:])
        yield from (self._setting(chunk, self.contexts[-1]) for chunk in SMALL_CHUNKS)

    def offload_settings(self) -> Iterator[Setting]:
        yield from (self._setting(chunk, self.contexts[-1]) for chunk in (OFFLOAD_CHUNK, *SMALL_CHUNKS))

    def _setting(self, chunk: int, context: int) -> Setting:
        """A step has room for a token of every row, and for no more of one sequence than it may have."""
        return Setting(max(min(chunk, context), self.concurrency), context, self.concurrency)


def contexts_of(footprint: Footprint, context: int | None) -> tuple[int, ...]:
    """The context asked for, or those that are tried. Raises BadPlanRequest for one the model cannot have."""
    longest = footprint.max_context
    if context is None:
        return tuple(sorted({min(c, longest) for c in (DEFAULT_CONTEXT, *SHORTER_CONTEXTS)}, reverse=True))
    if not 1 <= context <= longest:
        raise BadPlanRequest(f"context of {context:,} tokens: this model takes 1 to {longest:,}")
    return (context,)


def check_request(
    footprint: Footprint,
    budget: MemoryBudget,
    context: int | None,
    concurrency: int | None,
    alone: str | None,
) -> PlanRequest:
    """Fill defaults in. Raises BadPlanRequest for what the model cannot have."""
    contexts = contexts_of(footprint, context)
    if concurrency is not None and concurrency < 1:
        raise BadPlanRequest(f"concurrency of {concurrency:,}: at least 1 request must run")
    default = CPU_CONCURRENCY if budget.compute[0] == "cpu" else CUDA_CONCURRENCY
    rows = (concurrency or default) if alone is None else 1
    return PlanRequest(contexts, context is not None, rows, concurrency, alone)
