"""LoRA on stacked experts: peft's target_parameters on a parameter of three dimensions.

One pair of matrices serves all experts: lora_A is [experts * rank, inputs], with an expert's rows together;
lora_B is [outputs, rank * experts], with an expert's columns `experts` apart (peft 0.21, ParamWrapper). Their
update has the rows of all experts, one expert after the other; where a checkpoint has a tensor for each
expert, or gate and up apart, that tensor's update begins at `first_row`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from exporter.adapters.lora import rounded
from exporter.adapters.product import Product
from exporter.recipe import ChangeRows
from exporter.weights import Inputs, ReadRows, Stored

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsLowRank:
    """W[e] + (B_e @ A_e) * scaling for every expert e."""

    adapter: str
    a: Stored
    b: Stored
    experts: int
    scaling: float
    transposed: bool  # the parameter is [experts, inputs, outputs], as in gpt-oss
    rounds_first: bool = False  # see LowRank
    first_row: int = 0

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.a, self.b)

    @property
    def rows_of_one(self) -> int:
        """Rows of one expert's matrix."""
        return self.a.shape[1] if self.transposed else self.b.shape[0]

    def open(self, inputs: Inputs, before: ReadRows) -> ChangeRows:
        del before
        a, b = inputs.kept(self.a), inputs.kept(self.b)
        opened: dict[int, Product] = {}

        def change(first: int, rows: torch.Tensor) -> torch.Tensor:
            at, end = first + self.first_row, first + self.first_row + len(rows)
            while at < end:
                expert, row = divmod(at, self.rows_of_one)
                if expert not in opened:
                    opened.clear()  # experts come in their order
                    opened[expert] = self._product(a, b, expert)
                stop = min(self.rows_of_one, row + end - at)
                update = opened[expert].rows(row, stop)
                part = rows[at - first - self.first_row :][: stop - row]
                part.add_(rounded(update) if self.rounds_first else update)
                at += stop - row
            return rows

        return change

    def _product(self, a: torch.Tensor, b: torch.Tensor, expert: int) -> Product:
        rank = len(a) // self.experts
        of_a = a[expert * rank : (expert + 1) * rank]
        of_b = b[:, expert :: self.experts]
        left, right = (of_a.T, of_b.T) if self.transposed else (of_b, of_a)
        return Product(left, right, self.scaling)
