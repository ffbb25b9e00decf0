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

    Two sequences that are read together, so that rows are told apart as well. Their blocks are the first
    ones, which nobody holds yet. Layers of one kind are changed in one way, so one of them tells.
    """
    rows = _rows(runner)
    with runner.shortened():
        before = runner.step(rows).float().clone()
    change()
    try:
        with runner.shortened():
            after = runner.step(rows).float()
    except (AttributeError, TypeError) as error:  # a module that reads a weight which is packed now
        raise KernelsDiffer(switch, f"{type(error).__name__}: {error}") from error
    likeness = _likeness(before, after)
    if not likeness >= LEAST_LIKENESS:  # NaN is not, either
        raise KernelsDiffer(
            switch, f"the likeness of its logits is {likeness:.3f}, less than {LEAST_LIKENESS}"
        )


def _rows(runner: StepRunner) -> list[Row]:
    """Two, of ids from all over the vocabulary; one where there is no room for two."""
    layout = runner.layout
    most = min(2, runner.concurrency, runner.chunk_tokens, *(group.blocks for group in layout.groups))
    count = min(TOKENS, layout.block_tokens, runner.context, runner.chunk_tokens // most)
    return [
        Row(
            [runner.vocab * (2 * i + at + 1) // (2 * count + 2) for i in range(count)],
            start=0,
            tables=tuple([at] for _ in layout.groups),
            sample=True,
        )
        for at in range(most)
    ]


def _likeness(before: Any, after: Any) -> float:
    """Of the two rows that are the least alike."""
    before, after = (x - x.mean(-1, keepdim=True) for x in (before, after))
    return float(torch.nn.functional.cosine_similarity(before, after, dim=-1).min())
