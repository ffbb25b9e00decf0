"""DoRA: W + B @ A, brought to a learned length per output (arXiv 2402.09353).

As peft 0.21 merges it: m / norm(W + B @ A) * (W + B @ A), where the norm is over what one output is computed
from, and W in it is the base's own even where other adapters were merged before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.adapters.lora import Factors
from exporter.adapters.product import Product
from exporter.recipe import ChangeRows
from exporter.weights import BLOCK_ELEMENTS, Inputs, ReadRows, Stored, Weight, row_blocks

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Dora:
    """One DoRA adapter of one matrix. An output is a row of it; a column where the factors are transposed."""

    adapter: str
    factors: Factors
    magnitude: Stored  # a number per output
    base: Weight | None = None  # the matrix before any adapter, where others are merged before this one
    first_row: int = 0

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (*self.factors.stored, self.magnitude)

    def open(self, inputs: Inputs, before: ReadRows) -> ChangeRows:
        product = self.factors.open(inputs)
        magnitude = inputs.tensor(self.magnitude).float().view(-1)
        read = before if self.base is None else self.base.open(inputs)
        if self.factors.transposed:
            assert not self.first_row, "a column's norm needs all of the column"
            return self._by_column(product, magnitude / column_norms(_summed(product, read)))
        if self.base is not None:
            return self._by_row(product, magnitude / row_norms(_summed(product, read)))
        return self._by_own_row(product, magnitude)

    def _by_own_row(self, product: Product, magnitude: torch.Tensor) -> ChangeRows:
        def change(first: int, rows: torch.Tensor) -> torch.Tensor:
            import torch

            start = first + self.first_row
            rows.add_(product.rows(start, start + len(rows)))
            norms = torch.linalg.vector_norm(rows, dim=1)
            return rows.mul_((magnitude[start : start + len(rows)] / norms).view(-1, 1))

        return change

    def _by_row(self, product: Product, factor: torch.Tensor) -> ChangeRows:
        def change(first: int, rows: torch.Tensor) -> torch.Tensor:
            start = first + self.first_row
            rows.add_(product.rows(start, start + len(rows)))
            return rows.mul_(factor[start : start + len(rows)].view(-1, 1))

        return change

    def _by_column(self, product: Product, factor: torch.Tensor) -> ChangeRows:
        def change(first: int, rows: torch.Tensor) -> torch.Tensor:
            return rows.add_(product.rows(first, first + len(rows))).mul_(factor)

        return change


def _summed(product: Product, read: ReadRows) -> Iterator[torch.Tensor]:
    """W + B @ A in blocks of rows, fp32; each block is overwritten by the next."""
    columns = product.right.shape[1]
    for start, stop in row_blocks(0, product.n_rows, columns, BLOCK_ELEMENTS):
        yield product.rows(start, stop).add_(read(start, stop))


def row_norms(blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([torch.linalg.vector_norm(block, dim=1) for block in blocks])


def column_norms(blocks: Iterator[torch.Tensor]) -> torch.Tensor:
    """As torch.linalg.norm over the rows of the whole matrix: it adds the squares row after row in fp32.

    On processors without AVX-512 torch adds them in another order, so that few results differ from peft's in
    bf16's last place.
    """
    total: torch.Tensor | None = None
    for block in blocks:
        for row in block.mul_(block):
            total = row.clone() if total is None else total.add_(row)
    assert total is not None
    return total.sqrt_()
