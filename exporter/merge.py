"""Makes one tensor of the output: block of rows by block of rows, in fp32, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import TYPE_CHECKING

from exporter.errors import BadAdapter, BadQuantization
from exporter.recipe import ChangeRows, Recipe
from exporter.shards import output_dtype
from exporter.weights import BLOCK_ELEMENTS, Inputs, ReadRows, Weight, matrix, row_blocks

if TYPE_CHECKING:
    import torch

COPY_ELEMENTS = 1024 * 1024

# (rows, columns) -> memory of the output's dtype for just that much, written out in the order of the calls.
Room = Callable[[int, int], "torch.Tensor"]


@dataclass(frozen=True, slots=True)
class Change:
    """What a merge did to one tensor: the proof that it was merged. Norms are Frobenius norms."""

    name: str
    elements: int
    changed: int  # elements whose bf16 value is another than the base's
    base_norm: float
    update_norm: float
    drift_norm: float | None = None  # of (base - what the adapter was trained on), with --original-base


def merge(recipe: Recipe, inputs: Inputs, room: Room) -> Change | None:
    """Write the tensor into `room`'s memory; gives what adapters changed, None where they did not touch it.

    Raises BadAdapter, or BadQuantization for the base, where a value is not finite.
    """
    if not recipe.updates:
        _convert(recipe, inputs, room)
        return None
    return _Merging(recipe, inputs).run(room)


def same(one: Weight, other: Weight, inputs: Inputs) -> bool:
    """Whether two weights hold the same numbers."""
    if one.shape != other.shape:
        return False
    first, second = one.open(inputs), other.open(inputs)
    parts = row_blocks(0, *matrix(one.shape), BLOCK_ELEMENTS)
    # Cloned, because the two may be read into the same memory.
    return all(bool((first(start, end).clone() == second(start, end)).all()) for start, end in parts)


def _convert(recipe: Recipe, inputs: Inputs, room: Room) -> None:
    rows, columns = matrix(recipe.shape)
    read = recipe.base.open(inputs)
    is_copy = recipe.base.dtype == output_dtype(recipe)
    for start, end in row_blocks(0, rows, columns, COPY_ELEMENTS if is_copy else BLOCK_ELEMENTS):
        room(end - start, columns).copy_(read(recipe.first_row + start, recipe.first_row + end))


class _Merging:
    """One touched tensor on its way: buffers that every block uses again, and sums for the proof."""

    def __init__(self, recipe: Recipe, inputs: Inputs) -> None:
        self._recipe = recipe
        self._changes = open_updates(recipe, inputs)
        self._read = recipe.base.open(inputs)
        self._trained_on = recipe.trained_on.open(inputs) if recipe.trained_on else None
        self._before, self._merged = _Fp32(), _Fp32()
        self._changed = 0
        self._base_square = self._update_square = self._drift_square = 0.0

    def run(self, room: Room) -> Change:
        rows, columns = matrix(self._recipe.shape)
        for start, end in row_blocks(0, rows, columns, BLOCK_ELEMENTS):
            self._block(start, end, room(end - start, columns))
        return self._proof()

    def _block(self, start: int, end: int, out: torch.Tensor) -> None:
        first = self._recipe.first_row
        stored = self._read(first + start, first + end)
        before = self._before.copy_of(stored)
        merged = self._merged.copy_of(before)
        for change in self._changes:
            merged = change(start, merged)
        out.copy_(merged)
        self._changed += _count_different(stored, before, out)
        self._base_square += _square(before)
        self._update_square += _square(merged.sub_(before))
        if self._trained_on is not None:
            self._drift_square += _square(before.sub_(self._trained_on(first + start, first + end)))

    def _proof(self) -> Change:
        name = self._recipe.name
        if not isfinite(self._update_square):
            raise _not_finite(self._recipe, isfinite(self._base_square))
        drift = sqrt(self._drift_square) if self._trained_on is not None else None
        rows, columns = matrix(self._recipe.shape)
        return Change(
            name, rows * columns, self._changed, sqrt(self._base_square), sqrt(self._update_square), drift
        )


def open_updates(recipe: Recipe, inputs: Inputs) -> list[ChangeRows]:
    """The updates in their order, each told what the tensor is before it."""
    changes: list[ChangeRows] = []
    for update in recipe.updates:
        changes.append(update.open(inputs, _before(recipe, inputs, list(changes))))
    return changes


def _before(recipe: Recipe, inputs: Inputs, changes: list[ChangeRows]) -> ReadRows:
    """The base is opened when it is asked for: most updates need not see it."""
    opened: list[ReadRows] = []

    def rows(start: int, stop: int) -> torch.Tensor:
        import torch

        if not opened:
            opened.append(recipe.base.open(inputs))
        read = opened[0](recipe.first_row + start, recipe.first_row + stop)
        found = read.to(torch.float32, copy=True)
        for change in changes:
            found = change(start, found)
        return found

    return rows


def _square(values: torch.Tensor) -> float:
    import torch

    flat = values.reshape(-1)
    return float(torch.dot(flat, flat))


def _count_different(stored: torch.Tensor, before: torch.Tensor, out: torch.Tensor) -> int:
    """Elements of `out` whose bits are not those of the base, rounded as `out` is."""
    import numpy as np
    import torch

    base = stored if stored.dtype == out.dtype else before.to(out.dtype)
    # numpy compares and counts 16-bit integers ten times as fast as torch does bf16.
    different = base.view(torch.int16).numpy() != out.view(torch.int16).numpy()
    return int(np.count_nonzero(different))


class _Fp32:
    """A block in fp32, in memory that every block uses again."""

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def copy_of(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy of the rows."""
        import torch

        if self._memory is None or self._memory.numel() < rows.numel():
            self._memory = torch.empty(rows.numel(), dtype=torch.float32)
        return self._memory[: rows.numel()].view(rows.shape).copy_(rows)


def _not_finite(recipe: Recipe, is_base_finite: bool) -> BadAdapter | BadQuantization:
    who = ", ".join(dict.fromkeys(update.adapter for update in recipe.updates))
    if is_base_finite:
        return BadAdapter(
            who,
            f"{recipe.name}: merged values are not finite: the adapter holds NaN or infinity, or numbers so "
            "large that the sum overflows. Its training diverged; take an earlier checkpoint of it.",
        )
    return BadQuantization(
        recipe.base.stored[0].info.file,
        f"{recipe.name}: the base holds values that are not finite. Fetch it again.",
    )
