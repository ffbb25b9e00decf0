"""Whether a model that was changed for speed still computes what it did: asked once, before it serves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from loader.errors import LoaderError
from service.engine.rows import Row, StepRunner


class Shortened(StepRunner, Protocol):
    def shortened(self) -> AbstractContextManager[None]:
        """Meanwhile what is like an earlier part of the model may be left out."""
        ...


TOKENS = 8  # of each row
# Cosine of two rows of logits, their means taken off. Rounding in another order leaves 0.999 and more, even
# through many layers of bf16; a matrix that is read wrongly leaves nothing.
LEAST_LIKENESS = 0.97


class KernelsDiffer(LoaderError):
    """Our kernels do not compute what the model's own code does, on this machine or of this version."""

    def __init__(self, switch: str, found: str) -> None:
        super().__init__(
            f"with our kernels this model computes something else: {found}. Start it with {switch}, "
            "and report this with the versions of torch and transformers."
        )


def prove(runner: Shortened, change: Callable[[], None], switch: str) -> None:
    """Compare logits before and after `change`, which `switch` turns off. Raises KernelsDiffer.

    Two sequences that are read together, so that rows are told apart as well; then a token more of both, and
    of one alone, since steps of few tokens may have kernels of their own. Their blocks are the first ones,
    which nobody holds yet. Layers of one kind are changed in one way, so one of them tells.
    """
    steps = _steps(runner)
    with runner.shortened():
        before = _logits(runner, steps)
    change()
    try:
        with runner.shortened():
            after = _logits(runner, steps)
    except (AttributeError, TypeError) as error:  # a module that reads a weight which is packed now
        raise KernelsDiffer(switch, f"{type(error).__name__}: {error}") from error
    likeness = _likeness(before, after)
    if not likeness >= LEAST_LIKENESS:  # NaN is not, either
        found = f"the likeness of its logits is {likeness:.3f}, less than {LEAST_LIKENESS}"
        raise KernelsDiffer(switch, found)


def _logits(runner: StepRunner, steps: list[list[Row]]) -> torch.Tensor:
    return torch.cat([runner.step(rows).float() for rows in steps])


def _steps(runner: StepRunner) -> list[list[Row]]:
    """Prompts of ids from all over the vocabulary, two where there is room for two; a token more of each, and
    of the first alone, where a block has room for them."""
    layout = runner.layout
    most = min(2, runner.concurrency, runner.chunk_tokens, *(group.blocks for group in layout.groups))
    room = min(layout.block_tokens, runner.context)
    count = max(1, min(TOKENS, room - 2, runner.chunk_tokens // most))

    def row(at: int, first: int, ids: int) -> Row:
        numbers = range(first, first + ids)
        chosen = [runner.vocab * (2 * i + at + 1) // (2 * count + 6) for i in numbers]
        return Row(chosen, first, tuple([at] for _ in layout.groups), True)

    everybody = range(most)
    steps = [[row(at, 0, count) for at in everybody]]
    steps += [[row(at, count, 1) for at in everybody], [row(0, count + 1, 1)]]
    return steps[: 1 + max(0, room - count)]


def _likeness(before: Any, after: Any) -> float:
    """Of the two rows that are the least alike."""
    before, after = (x - x.mean(-1, keepdim=True) for x in (before, after))
    return float(torch.nn.functional.cosine_similarity(before, after, dim=-1).min())
