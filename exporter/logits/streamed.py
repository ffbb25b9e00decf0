"""Parameters that are read from disk while a forward runs, block of rows by block of rows.

A model of transformers is built without memory. Its matrices are put in place by objects that are no tensors:
torch hands every function that meets one to its `__torch_function__` (PyTorch's own protocol, "Extending
torch.* native functions"), and there a linear layer, an embedding or a row of experts is computed from the
files. So the model's own forward runs, whatever it does around its matrices, and never holds one.

The batch holds the same prompts once for every variant (variants.py), one variant after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from exporter.logits.variants import ADAPTED, VARIANTS, Compared, NotComparable, Reading
from loader.weights import Source, stacked_places

if TYPE_CHECKING:
    import torch

# torch's functions that are known to want x and a matrix, by name. Biases are added by `Streamed` itself.
_KNOWN = ("linear", "embedding", "addmm", "matmul", "mm")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a parameter, seen as a matrix, that one tensor of the output holds: all of that tensor's."""

    start: int
    stop: int
    tensor: str


def pieces(source: Source, shape: Sequence[int], where: str) -> list[Piece]:
    """The tensors that a parameter of this shape is made of, in the order of its rows.

    Raises NotComparable for a parameter that transformers computes from the file's tensors.
    """
    import torch

    first = next(source.tensors())
    if source.converter is None:
        return [Piece(0, prod(shape[:-1]) if len(shape) > 1 else shape[0], first.name)]
    places = stacked_places(source, torch.empty(tuple(shape), device="meta"))
    if not places:
        raise NotComparable(where, f"transformers converts {first.name} when it loads it")
    found = []
    for place, info in places:
        start = place.storage_offset() // shape[-1]
        found.append(Piece(start, start + place.shape[0], info.name))
    return sorted(found, key=lambda piece: piece.start)


class Streamed:
    """Stands where a matrix, or a stack of them, was; `shape` is the parameter's."""

    def __init__(
        self, compared: Compared, name: str, parts: Sequence[Piece], shape: Sequence[int], first: int = 0
    ) -> None:
        import torch

        self.shape = torch.Size(shape)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.bias: Mapping[str, torch.Tensor] = {}  # by variant, where the layer has one
        self.window: tuple[int, int] | None = None  # rows that a linear gives: the head's, block by block
        self._compared, self._name = compared, name
        self._parts, self._first = parts, first
        self._is_transposed = False
        self._readings: dict[str, Reading] = {}  # of a window before, which go on

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        x, weight = args[-2:] if name == "addmm" else (*args, None)[:2]
        if not isinstance(weight, Streamed) or name not in _KNOWN:
            streamed = next(arg for arg in args if isinstance(arg, Streamed))
            raise NotComparable(streamed._name, f"its forward calls torch's {name} with a matrix")
        if name == "embedding":
            return weight._embedding(x)
        return weight._linear(x) if (name == "linear") != weight._is_transposed else weight._matmul(x)

    def __getitem__(self, at: int) -> Streamed:
        """One matrix of a stack: an expert's."""
        rows = prod(self.shape[1:-1])
        return Streamed(self._compared, self._name, self._parts, self.shape[1:], self._first + int(at) * rows)

    @property
    def T(self) -> Streamed:
        other = copy(self)
        other._is_transposed = not self._is_transposed
        return other

    def float(self) -> Streamed:
        return self

    def to(self, *_: Any, **__: Any) -> Streamed:
        return self

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    # What modules do with a matrix

    def _linear(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W.T + bias; rows of W are outputs."""
        start, stop = self.window or (0, self.shape[0])
        inputs = self._by_variant(x)
        output = x.new_empty((*x.shape[:-1], stop - start))
        outputs = self._by_variant(output)
        for place, reading, first, last in self._tensors(start, stop):
            loras = (reading.loras or []) if ADAPTED in inputs else []
            projected = [inputs[ADAPTED] @ lora.right.T for lora in loras]
            for block in reading.blocks(first, last, tuple(inputs)):
                at = slice(place + block.start - first - start, place + block.stop - first - start)
                for variant, part in inputs.items():
                    outputs[variant][:, at] = part @ block.weights[variant].T
                for lora, inner in zip(loras, projected, strict=True):
                    outputs[ADAPTED][:, at] += inner @ lora.left[block.start : block.stop].T
        self._add_bias(outputs, start, stop)
        return output

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        """x @ W + bias; rows of W are inputs, as in GPT-2."""
        inputs = self._by_variant(x)
        output = x.new_zeros((*x.shape[:-1], self.shape[-1]))
        outputs = self._by_variant(output)
        for place, reading, first, last in self._tensors(0, self.shape[0]):
            loras = (reading.loras or []) if ADAPTED in inputs else []
            for block in reading.blocks(first, last, tuple(inputs)):
                at = slice(place + block.start - first, place + block.stop - first)
                for variant, part in inputs.items():
                    outputs[variant] += part[:, at] @ block.weights[variant]
                for lora in loras:
                    left = lora.left[block.start : block.stop]
                    outputs[ADAPTED] += (inputs[ADAPTED][:, at] @ left) @ lora.right
        self._add_bias(outputs, 0, self.shape[-1])
        return output

    def _embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of W, read for just the ids that are there, in order."""
        import torch

        unique, where = ids.unique(return_inverse=True)
        reading = self._compared.open(self._parts[0].tensor)
        blocks = [next(reading.blocks(row, row + 1, VARIANTS)) for row in unique.tolist()]
        found = []
        for variant, part in zip(self._compared.active, self._compared.split(where, self._name), strict=True):
            found.append(torch.cat([block.values(variant) for block in blocks])[part])
        return torch.cat(found)

    # Rows

    def _tensors(self, start: int, stop: int) -> Iterator[tuple[int, Reading, int, int]]:
        """(row of this matrix, reading, first row and row after the last of the tensor), in turn."""
        for part in self._parts:
            first = max(part.start, self._first + start)
            last = min(part.stop, self._first + stop)
            if first < last:
                yield first - self._first, self._reading(part), first - part.start, last - part.start

    def _reading(self, part: Piece) -> Reading:
        """From the first row; the head's goes on from window to window."""
        goes_on = self.window is not None and self.window[0] > 0
        reading = self._readings.get(part.tensor) if goes_on else None
        reading = reading or self._compared.open(part.tensor)
        if self.window is not None:
            self._readings[part.tensor] = reading
        return reading

    def _by_variant(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """[tokens, columns] of every variant in a batch; views of it where it is contiguous."""
        parts = zip(self._compared.active, self._compared.split(x, self._name), strict=True)
        return {variant: part.reshape(-1, x.shape[-1]) for variant, part in parts}

    def _add_bias(self, outputs: Mapping[str, torch.Tensor], start: int, stop: int) -> None:
        for variant, output in outputs.items():
            if self.bias:
                output += self.bias[variant][start:stop]
