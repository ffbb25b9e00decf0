"""Scales and zero points: one number for each block of a matrix."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from exporter.errors import BadQuantization
from exporter.weights import Inputs, Stored, matrix

if TYPE_CHECKING:
    import torch

FLOATS = frozenset({"F32", "F16", "BF16"})
EXPONENTS = frozenset({"F8_E8M0", "U8"})  # ue8m0: the byte b stands for 2^(b - 127)

InPlace = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]


def blocks(length: int, size: int) -> int:
    """How many blocks of `size` it takes to cover `length`; the last may be cut short."""
    return -(-length // size)


@dataclass(frozen=True, slots=True)
class Grid:
    """A number per block of `block` rows and columns; at the right and lower edge blocks may be cut short.

    The weight is a matrix or a stack of them [..., rows, columns]; no block reaches into the next of a stack.
    """

    stored: Stored
    shape: tuple[int, ...]  # of the weight
    block: tuple[int, int]

    @property
    def lines(self) -> tuple[int, int]:
        """Rows and columns of the grid of one matrix."""
        return blocks(self.shape[-2], self.block[0]), blocks(self.shape[-1], self.block[1])

    def scale(
        self, inputs: Inputs, rows: torch.Tensor, start: int, groups: torch.Tensor | None = None
    ) -> None:
        """Multiply rows of the weight (fp32, contiguous, `start` the first) in place.

        `groups` gives each column's column of the grid, where they are not in order.
        """
        import torch

        self._apply(torch.Tensor.mul_, inputs, rows, start, groups)

    def subtract(
        self, inputs: Inputs, rows: torch.Tensor, start: int, groups: torch.Tensor | None = None
    ) -> None:
        """The same, subtracting."""
        import torch

        self._apply(torch.Tensor.sub_, inputs, rows, start, groups)

    def read(self, inputs: Inputs, start: int, stop: int) -> torch.Tensor:
        """Lines of the grid in fp32; the next read may overwrite them."""
        import torch

        if self.stored.info.dtype in EXPONENTS:
            as_bytes = replace(self.stored, info=replace(self.stored.info, dtype="U8"))
            return inputs.rows(as_bytes, start, stop).view(torch.float8_e8m0fnu).float()
        return inputs.rows(self.stored, start, stop).float()

    def _apply(
        self, change: InPlace, inputs: Inputs, rows: torch.Tensor, start: int, groups: torch.Tensor | None
    ) -> None:
        if self.block[0] == 1:
            self._spread(change, rows, self.read(inputs, start, start + len(rows)), groups)
            return
        for line, top, bottom in self._bands(start, start + len(rows)):
            self._spread(
                change, rows[top - start : bottom - start], self.read(inputs, line, line + 1), groups
            )

    def _bands(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(line of the grid, first row, row after the last) of each run of rows that share a line."""
        height, at = self.shape[-2], start
        while at < stop:
            above, row = divmod(at, height)
            line = row // self.block[0]
            end = min(stop, above * height + min((line + 1) * self.block[0], height))
            yield above * self.lines[0] + line, at, end
            at = end

    def _spread(
        self, change: InPlace, rows: torch.Tensor, numbers: torch.Tensor, groups: torch.Tensor | None
    ) -> None:
        """Numbers of one line, or of a line for each row, onto their columns."""
        count, width = rows.shape[1], self.block[1]
        if groups is not None:
            change(rows, numbers.index_select(1, groups))
        elif count % width == 0:
            change(rows.view(len(rows), count // width, width), numbers.unsqueeze(2))
        else:
            change(rows, numbers.repeat_interleave(width, dim=1)[:, :count])


def checked(source: str, name: str, grid: Grid, dtypes: Collection[str]) -> Grid:
    """The grid, when it is one of these dtypes and has a number for every block of the weight `name`.

    Raises BadQuantization. The size of a block is never guessed from the grid: a wrong guess would go unseen.
    """
    stored, (down, across) = grid.stored, grid.lines
    if stored.info.dtype not in dtypes:
        known = ", ".join(sorted(dtypes))
        raise BadQuantization(source, f"{stored.name} is {stored.info.dtype}; snugfit reads {known} there.")
    if matrix(stored.shape) != (down * prod(grid.shape[:-2]), across):
        height, width = grid.block
        raise BadQuantization(
            source,
            f"{stored.name} is {list(stored.shape)}, but {name} of {list(grid.shape)} in blocks of "
            f"{height}x{width} has {[*grid.shape[:-2], down, across]} of them. config.json and the "
            "weights do not belong together, or the weights were padded or cut after they were quantized.",
        )
    return grid
