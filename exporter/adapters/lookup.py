"""Finds the base's tensor for a path in an adapter, which may be of another version of transformers.

A path must be a tensor's whole name, never a part of one. Where there is none of that name, the name that
transformers 5 would save it under counts (exporter/conversion/layouts.py); and then names are compared
without the words that versions of transformers put in front ("model.language_model.layers" was
"language_model.model.layers"), which counts where exactly one tensor is meant.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.conversion import layouts
from exporter.weights import Weight

_FRONT = re.compile(r"(?:(?:model|language_model|text_model|transformer|decoder)\.)+")
_MIXTRAL_EXPERT = re.compile(r"(experts\.\d+)\.(w[123])(?=\.)")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_EXPERT = re.compile(r"(.*experts)\.(\d+)\.(\w+)\.weight")


def bare(name: str) -> str:
    """A name as far as versions of transformers agree on it."""
    name = _FRONT.sub("", name, count=1) if _FRONT.match(name) else name
    name = name.replace("block_sparse_moe.", "mlp.")
    return _MIXTRAL_EXPERT.sub(lambda match: f"{match[1]}.{_MIXTRAL_PARTS[match[2]]}", name)


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """A tensor of the base that is a part of what transformers 5 has as one parameter for all experts."""

    name: str
    first_row: int  # where it begins in the stacked parameter's rows


@dataclass(frozen=True, slots=True)
class Stack:
    """The stacked parameter: its shape, and the tensors of the base that it is made of."""

    shape: tuple[int, ...]
    tensors: tuple[ExpertTensor, ...]


class BaseTensors:
    """The tensors of a base by name."""

    def __init__(self, weights: Sequence[Weight], config: Mapping[str, Any]) -> None:
        self._config = config
        self._exact = {weight.name: weight for weight in weights}
        self._bare: dict[str, list[Weight]] = defaultdict(list)
        self._experts: dict[str, dict[str, dict[int, Weight]]] = defaultdict(lambda: defaultdict(dict))
        for weight in weights:
            name = bare(weight.name)
            self._bare[name].append(weight)
            if match := _EXPERT.fullmatch(name):
                self._experts[match[1]][match[3]][int(match[2])] = weight

    def find(self, name: str) -> Weight | None:
        """The tensor of that name; None where there is none, or more than one that it could be."""
        for known in (name, self.name_of(name)):
            if known in self._exact:
                return self._exact[known]
        candidates = self._bare.get(bare(name), [])
        return candidates[0] if len(candidates) == 1 else None

    def name_of(self, name: str) -> str:
        """What a tensor of that name is called in the output."""
        return layouts.rename(name, self._config)

    def stack(self, path: str, parameter: str) -> Stack | None:
        """The parameter that stacks all experts at `path`, from a tensor for each; None where there is none.

        gate_up_proj has an expert's gate above its up, as transformers 5 stacks them.
        """
        parts = self._experts.get(bare(path), {})
        names = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
        if any(name not in parts for name in names):
            return None
        first = [parts[name].get(0) for name in names]
        count = len(parts[names[0]])
        if any(weight is None or len(weight.shape) != 2 for weight in first):
            return None
        if any(sorted(parts[name]) != list(range(count)) for name in names):
            return None
        return _stacked([[parts[name][expert] for name in names] for expert in range(count)])


def _stacked(experts: list[list[Weight]]) -> Stack | None:
    shapes = [weight.shape for weight in experts[0]]
    if any([weight.shape for weight in expert] != shapes for expert in experts):
        return None
    rows = sum(shape[0] for shape in shapes)
    tensors = []
    for number, expert in enumerate(experts):
        at = number * rows
        for weight in expert:
            tensors.append(ExpertTensor(weight.name, at))
            at += weight.shape[0]
    return Stack((len(experts), rows, shapes[0][1]), tuple(tensors))
