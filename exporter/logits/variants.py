"""One tensor as three models have it: merged, as base and adapter side by side, and the base's own.

For the check of logits (compare.py). All three are read in the same pass, in blocks of rows, so that
the memory is the same for every model; and every merged weight that is met is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from exporter.adapters.lora import LowRank
from exporter.errors import ExportError, VerificationFailed
from exporter.merge import open_updates
from exporter.recipe import ChangeRows, Recipe
from exporter.weights import BLOCK_ELEMENTS, Inputs, ReadRows, Stored, matrix, row_blocks
from loader.headers import TensorInfo

if TYPE_CHECKING:
    import torch

MERGED, ADAPTED, BASE = "merged", "base and adapter", "base"
VARIANTS = (MERGED, ADAPTED, BASE)

# Of a weight and of its update: what fp32 may round away, far below bf16's steps of 2^-8 to 2^-7.
FP32_NOISE = 2.0**-13
FP32_UNIT = 2.0**-24
# Share of a change that may be left over where it is said to be a multiple of the adapter's.
EXPLAINED = 0.05

# -> what the sums of a block's updates may differ by beyond that, for each of its weights
Noise = Callable[[], "torch.Tensor | float"]


class NotComparable(ExportError):
    """The check of logits cannot run this architecture in blocks of rows."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(
            f"{source}: --check-logits cannot run this model: {reason}. The weights are not touched by this: "
            "export without --check-logits, and let snugfit verify compare every byte."
        )


@dataclass(frozen=True, slots=True)
class Beside:
    """A LoRA that stays beside its matrix: two small ones in fp32, whose product is added to the matrix."""

    left: torch.Tensor  # [rows, rank], multiplied with the scaling
    right: torch.Tensor  # [rank, columns]

    def noise(self, start: int, stop: int) -> torch.Tensor:
        """By how much two fp32 products may differ that sum in different orders, for each weight of the rows.

        Each is within (rank + 1) units of the sum of absolute values (Higham, "Accuracy and Stability of
        Numerical Algorithms", 3.1), which the norms bound: products that cancel leave more than their sum
        lets one expect.
        """
        norms = self.left[start:stop].norm(dim=1)[:, None] * self.right.norm(dim=0)
        return norms.mul_(2 * (len(self.right) + 1) * FP32_UNIT)


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of one tensor in fp32. With LoRAs beside it, ADAPTED are the base's: those act on activations, as
    they did in training."""

    start: int
    stop: int
    weights: Mapping[str, torch.Tensor]
    expected: torch.Tensor  # with MERGED: base and adapter summed, the merged rows before they are rounded

    def values(self, variant: str) -> torch.Tensor:
        """The rows of one variant as plain numbers, in memory of their own."""
        return self.expected if variant == ADAPTED else self.weights[variant]


class Reading:
    """One pass through a tensor, from its first row to its last."""

    def __init__(self, recipe: Recipe, merged: Stored, compared: Compared) -> None:
        self._recipe, self._merged, self._compared = recipe, merged, compared
        self.loras = beside(recipe, compared.inputs)
        self._changes: list[ChangeRows] = []
        if self.loras is None:
            self._changes = open_updates(recipe, compared.inputs)
        self._read: ReadRows = recipe.base.open(compared.inputs)

    def blocks(self, start: int, stop: int, variants: Sequence[str]) -> Iterator[Block]:
        """Rows from `start` on in blocks; only what these variants need is read."""
        columns = matrix(self._recipe.shape)[1]
        for first, end in row_blocks(start, stop, columns, BLOCK_ELEMENTS):
            yield self._block(first, end, variants)

    def _block(self, start: int, stop: int, variants: Sequence[str]) -> Block:
        import torch

        first = self._recipe.first_row
        base = self._read(first + start, first + stop).to(torch.float32, copy=True)
        adapted = base if self.loras is not None else self._changed(start, base)
        weights, expected = {ADAPTED: adapted, BASE: base}, adapted
        if MERGED in variants:
            expected = self._summed(start, adapted)
            merged = self._compared.merged_inputs.rows(self._merged, start, stop)
            noise = partial(self._noise, start, stop)
            self._compared.check.add(self._recipe.name, merged, expected, base, noise)
            weights[MERGED] = merged.to(torch.float32, copy=True)
        return Block(start, stop, weights, expected)

    def _changed(self, start: int, base: torch.Tensor) -> torch.Tensor:
        adapted = base.clone() if self._changes else base
        for change in self._changes:
            adapted = change(start, adapted)
        return adapted

    def _summed(self, start: int, adapted: torch.Tensor) -> torch.Tensor:
        """What the merged rows should be, before they are rounded."""
        for lora in self.loras or ():
            adapted = adapted.addmm(lora.left[start : start + len(adapted)], lora.right)
        return adapted

    def _noise(self, start: int, stop: int) -> torch.Tensor | float:
        return sum((lora.noise(start, stop) for lora in self.loras or ()), 0.0)


def beside(recipe: Recipe, inputs: Inputs) -> list[Beside] | None:
    """The updates of a tensor that need not be merged; None where one of them is of another kind."""
    rows = matrix(recipe.shape)[0]
    loras = [update for update in recipe.updates if isinstance(update, LowRank) and not update.rounds_first]
    if len(loras) < len(recipe.updates):
        return None
    return [_beside(update, rows, inputs) for update in loras]


def _beside(update: LowRank, rows: int, inputs: Inputs) -> Beside:
    factors = update.factors
    left, right = inputs.tensor(factors.b).float(), inputs.tensor(factors.a).float()
    if factors.transposed:
        left, right = right.T, left.T
    return Beside(left[update.first_row : update.first_row + rows] * factors.scaling, right)


class Compared:
    """The merged model's files, and the base's and adapters'. Used by `with`."""

    def __init__(self, recipes: Sequence[Recipe], folder: Path, tensors: Sequence[TensorInfo]) -> None:
        _refuse_another_plan(recipes, folder, tensors)
        self.inputs, self.merged_inputs = Inputs(), Inputs()
        self.check = WeightCheck()
        self.active: tuple[str, ...] = VARIANTS  # whose activations a forward holds just now, in this order
        self.batch = (1, 1)  # prompts and tokens of each variant
        self._recipes = {recipe.name: recipe for recipe in recipes}
        self._merged = {info.name: Stored(info, folder) for info in tensors}

    def open(self, name: str) -> Reading:
        """Begin to read one tensor of the output."""
        return Reading(self._recipes[name], self._merged[name], self)

    def split(self, x: torch.Tensor, where: str) -> tuple[torch.Tensor, ...]:
        """Each variant's part of a batch. Raises NotComparable for what is not ordered by variants."""
        if not self.is_batch(x):
            raise NotComparable(where, f"it is called with {list(x.shape)}, which is no batch of the prompts")
        return tuple(x.chunk(len(self.active)))

    def is_batch(self, x: torch.Tensor) -> bool:
        """Whether its first dimension is of prompts, or of all their tokens, in the order of the variants."""
        count, (prompts, tokens) = len(self.active), self.batch
        return count == 1 or x.shape[0] in (count * prompts, count * prompts * tokens)

    def __enter__(self) -> Compared:
        return self

    def __exit__(self, *_: object) -> None:
        self.inputs.close()
        self.merged_inputs.close()


def _refuse_another_plan(recipes: Sequence[Recipe], folder: Path, tensors: Sequence[TensorInfo]) -> None:
    planned = {recipe.name: recipe.shape for recipe in recipes}
    found = {info.name: info.shape for info in tensors}
    problems = [
        f"{name}: {_shape(found.get(name))} in the folder, {_shape(planned.get(name))} in the plan"
        for name in sorted(planned.keys() | found.keys())
        if planned.get(name) != found.get(name)
    ]
    if problems:
        raise VerificationFailed(str(folder), problems)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


@dataclass(slots=True)
class _Tally:
    read: int = 0
    off: int = 0
    # Inner products in blocks where weights are off, of what was done and the update that was to be done.
    along: float = 0.0
    done_square: float = 0.0
    update_square: float = 0.0

    def add(self, done: torch.Tensor, update: torch.Tensor) -> None:
        self.along += float(done @ update)
        self.done_square += float(done @ done)
        self.update_square += float(update @ update)


class WeightCheck:
    """Whether every merged weight is the bf16 number nearest to base and adapter together.

    That is what one rounding of an fp32 sum gives, so no limit has to be chosen: a weight may only be another
    where the sum lies so near the middle of two bf16 numbers that fp32's own noise decides.
    """

    def __init__(self) -> None:
        self._tallies: dict[str, _Tally] = {}

    def add(
        self, name: str, merged: torch.Tensor, expected: torch.Tensor, base: torch.Tensor, noise: Noise
    ) -> None:
        """Rows of a tensor as they are in the file, as they should be in fp32, and before the update."""
        tally = self._tallies.setdefault(name, _Tally())
        tally.read += merged.numel()
        rounded = expected.to(merged.dtype)
        others = merged != rounded
        if bool(others.any()):
            merged, rounded, update = merged.float(), rounded.float(), expected - base
            excess = (merged - expected).abs() - (rounded - expected).abs()
            allowed = FP32_NOISE * (expected.abs() + update.abs()) + noise()
            tally.off += int((others & ~(excess <= allowed)).sum())  # NaN is off
            tally.add((merged - base).flatten(), update.flatten())

    @property
    def weights(self) -> int:
        return sum(tally.read for tally in self._tallies.values())

    @property
    def problems(self) -> list[str]:
        """A sentence for every tensor that is not what it should be."""
        return [
            f"{name}: {tally.off:,} of {tally.read:,} weights are not base + adapter{_times(tally)}"
            for name, tally in self._tallies.items()
            if tally.off
        ]


def _times(tally: _Tally) -> str:
    """How often the adapter seems to have been added, where that explains what is there."""
    if not tally.update_square:
        return ""
    times = tally.along / tally.update_square
    unexplained = tally.done_square - times * tally.along
    if not unexplained <= EXPLAINED * max(tally.done_square, tally.update_square):
        return ""
    return f" (as if the adapter had been added {times:.2f} times)"
