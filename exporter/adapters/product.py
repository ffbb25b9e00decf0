"""B @ A by rows: bit for bit the rows of the whole product, however it is cut into blocks."""

from __future__ import annotations

from math import frexp
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# BLAS multiplies fewer rows in another way, and adds in another order: a single one as a vector, and MKL on
# AMD's processors up to three.
FEWEST_ROWS = 4


class Product:
    """left @ right * scaling, of which rows are asked for. Memory for one block is used again and again."""

    def __init__(self, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
        """`left` is [rows, rank] of any float dtype, `right` [rank, columns]; both are kept in memory."""
        import torch

        # BLAS adds in another order where a matrix lies transposed in memory.
        self.left = left.contiguous()
        self.right = right.to(torch.float32).contiguous()
        self._scaling = scaling
        if abs(frexp(scaling)[0]) == 0.5:  # by a power of two all that follows is the same, so once is enough
            self.right, self._scaling = self.right * scaling, 1.0
        self._buffer = torch.empty(0)

    @property
    def n_rows(self) -> int:
        return len(self.left)

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """fp32 [stop - start, columns]; the next call may overwrite it, and its caller may too."""
        import torch

        first, last = start, stop
        if stop - start < FEWEST_ROWS:
            first = max(0, min(start, self.n_rows - FEWEST_ROWS))
            last = min(first + FEWEST_ROWS, self.n_rows)
        out = self._room(last - first)
        torch.mm(self.left[first:last].to(torch.float32), self.right, out=out)
        out = out[start - first : stop - first]
        return out if self._scaling == 1 else out.mul_(self._scaling)

    def _room(self, rows: int) -> torch.Tensor:
        import torch

        if len(self._buffer) < rows:
            self._buffer = torch.empty(rows, self.right.shape[1])
        return self._buffer[:rows]
