"""Weights that are w = (q - z) * s in float32: a code q of few bits each, a scale and a zero point per group.

A group is some of the inputs (columns) of one output (row). GPTQ and AWQ files hold the transposed matrix,
so that an output is a column there. Here columns are read a slab at a time and turned, which bounds memory
however big the matrix is; the numbers are made only for the rows that are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.weights import Inputs, ReadRows, Stored, matrix

if TYPE_CHECKING:
    import torch

# Of packed codes. Twice that is held while a slab is turned.
SLAB_BYTES = 16 * 2**20
# Packed words, and packed zero points, have parts of up to 32 outputs: slabs begin and end there.
ALIGN = 32

# (first row, row after the last, both counted from the slab's first; where they go, float32 [rows, columns])
WriteCodes = Callable[[int, int, "torch.Tensor"], None]


@dataclass(frozen=True, slots=True)
class Slab:
    """Some outputs of a matrix, their codes still packed."""

    first: int
    stop: int
    write_codes: WriteCodes
    zeros: torch.Tensor  # float32, [outputs, groups]
    scales: torch.Tensor


LoadSlab = Callable[[int, int], Slab]  # (first output, output after the last)


def read_rows(
    shape: tuple[int, int], bits: int, groups: torch.Tensor, n_groups: int, load: LoadSlab
) -> ReadRows:
    """Rows of a matrix of outputs x inputs, made of slabs. `groups` is the group of each input, int64."""
    size = shape[1] // n_groups
    in_order = size * n_groups == shape[1] and bool((groups == _in_order(shape[1], size)).all())
    slab_rows = max(1, SLAB_BYTES * 8 // (shape[1] * bits))
    return _Rows(shape, slab_rows, None if in_order else groups, load)


class _Rows:
    def __init__(
        self, shape: tuple[int, int], slab_rows: int, groups: torch.Tensor | None, load: LoadSlab
    ) -> None:
        import torch

        self._outputs, self._inputs = shape
        self._slab_rows, self._groups, self._load = slab_rows, groups, load
        self._slab: Slab | None = None
        self._room = torch.empty((0, self._inputs), dtype=torch.float32)

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        import torch

        slab = self._slab_with(start, stop)
        start, stop = start - slab.first, stop - slab.first
        if len(self._room) < stop - start:
            self._room = torch.empty((stop - start, self._inputs), dtype=torch.float32)
        rows = self._room[: stop - start]
        slab.write_codes(start, stop, rows)
        return dequantize(rows, slab.zeros[start:stop], slab.scales[start:stop], self._groups)

    def _slab_with(self, start: int, stop: int) -> Slab:
        slab = self._slab
        if slab is None or not slab.first <= start <= stop <= slab.stop:
            first = start // ALIGN * ALIGN
            end = -(-max(stop, first + self._slab_rows) // ALIGN) * ALIGN
            self._slab = slab = None  # the old one goes before the new one comes
            self._slab = slab = self._load(first, min(self._outputs, end))
        return slab


def _in_order(count: int, size: int) -> torch.Tensor:
    import torch

    return torch.arange(count) // size


def dequantize(
    codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, groups: torch.Tensor | None
) -> torch.Tensor:
    """(q - z) * s in place, [rows, columns]; the difference is exact and the product is rounded once.

    `groups` is the group of each column; None: groups of one size, in order.
    """
    import torch

    if groups is None:
        by_group = codes.view(*zeros.shape, codes.shape[1] // zeros.shape[1])
        by_group.sub_(zeros.unsqueeze(-1)).mul_(scales.unsqueeze(-1))
        return codes
    codes.sub_(torch.index_select(zeros, 1, groups))
    return codes.mul_(torch.index_select(scales, 1, groups))


def turned(inputs: Inputs, stored: Stored, start: int, stop: int) -> torch.Tensor:
    """Columns of a tensor as rows, [stop - start, rows], in its own dtype."""
    whole = (start, stop) == (0, matrix(stored.shape)[1])
    return turn(inputs.tensor(stored) if whole else inputs.columns(stored, start, stop))


def turn(matrix: torch.Tensor) -> torch.Tensor:
    """The transposed matrix in memory of its own; rows of words may be viewed as bytes, single ones too."""
    import torch

    return torch.empty(matrix.shape[::-1], dtype=matrix.dtype).copy_(matrix.t())
