"""How one tensor of the output is made: rows of the base, changed by what adapters learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from exporter.weights import Inputs, ReadRows, Stored, Weight

if TYPE_CHECKING:
    import torch

# (first row of the output tensor, its rows in fp32) -> the rows changed, in fp32; may work in place.
ChangeRows = Callable[[int, "torch.Tensor"], "torch.Tensor"]


class Update(Protocol):
    """What one adapter does to one tensor. It knows headers only, until it is opened."""

    @property
    def adapter(self) -> str:
        """The adapter as the user typed it."""
        ...

    @property
    def first_row(self) -> int:
        """The row of the update that meets row 0 of the output tensor: above 0 where the output is a slice of
        what the adapter was trained on (q, k and v of a fused matrix, one of many stacked experts)."""
        ...

    @property
    def stored(self) -> tuple[Stored, ...]:
        """Every adapter tensor that is read for it."""
        ...

    def open(self, inputs: Inputs, before: ReadRows) -> ChangeRows:
        """Read the adapter's small matrices and begin. Rows come from first to last, each once.

        `before` gives rows of the output tensor as they are before this update, in fp32, for what must look
        at the whole tensor first. It must not be called any more when `open` has returned.
        """
        ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor of the output."""

    name: str
    shape: tuple[int, ...]
    base: Weight
    first_row: int = 0  # of the base's matrix: above 0 where the output is a slice of it
    updates: tuple[Update, ...] = ()  # in order; their sum is rounded once
    trained_on: Weight | None = None  # with --original-base: the quantized tensor, for the drift report
