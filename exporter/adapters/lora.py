"""What adapters do to a tensor, as peft 0.21 merges them (`merge_and_unload`, safe_merge off), bit for bit.

LoRA: arXiv 2106.09685. Everything is added in fp32; who writes the rows rounds them, once. DoRA is in
exporter/adapters/dora.py, stacked experts are in exporter/adapters/experts.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.adapters.product import Product
from exporter.recipe import ChangeRows
from exporter.weights import Inputs, ReadRows, Stored

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Factors:
    """Two matrices whose product is an update of low rank."""

    a: Stored  # [rank, inputs]
    b: Stored  # [outputs, rank]
    scaling: float  # the adapter's weight is in it
    # The tensor's rows are a's columns: GPT-2's Conv1D keeps its weights so, and an embedding has A's columns
    # for its rows.
    transposed: bool = False

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.a, self.b)

    def open(self, inputs: Inputs) -> Product:
        """The product by the tensor's rows."""
        if self.transposed:
            return Product(columns_as_rows(inputs, self.a), inputs.tensor(self.b).T, self.scaling)
        return Product(inputs.tensor(self.b), inputs.tensor(self.a), self.scaling)


def columns_as_rows(inputs: Inputs, stored: Stored) -> torch.Tensor:
    """A matrix transposed while it is read, so that it is in memory once: an embedding's A is a large one."""
    import torch

    from loader.shards import torch_dtype

    n_rows, columns = stored.shape
    out = torch.empty((columns, n_rows), dtype=torch_dtype(stored.info.dtype))
    for row in range(n_rows):
        out[:, row] = inputs.rows(stored, row, row + 1)[0]
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class LowRank:
    """W + (B @ A) * scaling: LoRA, and rsLoRA, which differs in the scaling only."""

    adapter: str
    factors: Factors
    # peft rounds the update of an embedding and of a parameter to the model's dtype before it is added. To
    # give the same bits so does this, where there is no sum of adapters to keep exact.
    rounds_first: bool = False
    first_row: int = 0

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.factors.stored

    def open(self, inputs: Inputs, before: ReadRows) -> ChangeRows:
        del before
        product = self.factors.open(inputs)

        def change(first: int, rows: torch.Tensor) -> torch.Tensor:
            start = first + self.first_row
            update = product.rows(start, start + len(rows))
            return rows.add_(rounded(update) if self.rounds_first else update)

        return change


def rounded(update: torch.Tensor) -> torch.Tensor:
    """To bf16, as peft leaves an update that it adds to a bf16 tensor of its own accord."""
    import torch

    return update.to(torch.bfloat16)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddBias:
    """bias + B's bias * scaling: what `lora_bias` trains."""

    adapter: str
    bias: Stored  # [outputs]
    scaling: float
    first_row: int = 0

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.bias,)

    def open(self, inputs: Inputs, before: ReadRows) -> ChangeRows:
        del before
        update = inputs.tensor(self.bias).float().view(-1, 1).mul_(self.scaling)

        def change(first: int, rows: torch.Tensor) -> torch.Tensor:
            start = first + self.first_row
            return rows.add_(update[start : start + len(rows)])

        return change


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaceRows:
    """Some rows are the adapter's own: `trainable_token_indices`."""

    adapter: str
    values: Stored  # [tokens, columns]
    rows: tuple[int, ...]  # of the whole matrix, in the order of `values`
    first_row: int = 0

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.values,)

    def open(self, inputs: Inputs, before: ReadRows) -> ChangeRows:
        del before
        values = inputs.tensor(self.values)

        def change(first: int, rows: torch.Tensor) -> torch.Tensor:
            start = first + self.first_row
            for at, row in enumerate(self.rows):
                if start <= row < start + len(rows):
                    rows[row - start] = values[at]
            return rows

        return change
