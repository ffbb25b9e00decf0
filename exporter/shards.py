"""Which tensors go into which file of the output, and the header of every file; before a weight is read.

Tensors stand in the order in which a forward meets them, so that a layer is one run of bytes in one file
where it fits. Format: safetensors' own documentation; index and names as huggingface_hub's
`split_torch_state_dict_into_shards` has them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import prod
from typing import Any

from exporter.recipe import Recipe
from loader.checkpoint import INDEX, SINGLE
from loader.headers import DTYPE_BITS, LENGTH_BYTES, MAX_HEADER_BYTES

# Data begins at a page, for whoever maps a file or reads it past the page cache.
ALIGNMENT_BYTES = 4096

_LAYER = re.compile(r"(.*?\.)(\d+)\.")
_FIRST = ("embed", "wte", "wpe")
# Numbers that are not weights keep their type: positions, masks.
_KEPT_DTYPES = frozenset({"BOOL", "U8", "I8", "I16", "U16", "I32", "U32", "I64", "U64"})


def output_dtype(recipe: Recipe) -> str:
    """safetensors' name of the dtype that a tensor is written in: BF16 for every float."""
    return recipe.base.dtype if recipe.base.dtype in _KEPT_DTYPES else "BF16"


def output_bytes(recipe: Recipe) -> int:
    return prod(recipe.shape) * DTYPE_BITS[output_dtype(recipe)] // 8


@dataclass(frozen=True)
class OutputShard:
    """One file of the output."""

    file: str
    recipes: tuple[Recipe, ...]

    @cached_property
    def header(self) -> bytes:
        """Everything before the data: the length, the JSON, and spaces up to a multiple of a page."""
        described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for recipe in self.recipes:
            start, end = end, end + output_bytes(recipe)
            described[recipe.name] = {
                "dtype": output_dtype(recipe), "shape": list(recipe.shape), "data_offsets": [start, end]
            }  # fmt: skip
        text = json.dumps(described, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-(LENGTH_BYTES + len(text)) % ALIGNMENT_BYTES)
        assert len(text) <= MAX_HEADER_BYTES
        return len(text).to_bytes(LENGTH_BYTES, "little") + text

    @cached_property
    def n_bytes(self) -> int:
        """Of the whole file."""
        return len(self.header) + sum(output_bytes(recipe) for recipe in self.recipes)


def in_layer_order(recipes: Iterable[Recipe]) -> list[Recipe]:
    """Embeddings, then layers by number, then the rest; names in natural order within each."""
    return sorted(recipes, key=_place)


def _place(recipe: Recipe) -> tuple[int, str, int, list[tuple[int, int | str]]]:
    layer = _LAYER.match(recipe.name)
    if layer:
        return 1, layer[1], int(layer[2]), _natural(recipe.name)
    is_first = any(word in recipe.name for word in _FIRST)
    return 0 if is_first else 2, "", 0, _natural(recipe.name)


def _natural(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def pack(recipes: Sequence[Recipe], shard_bytes: int) -> tuple[OutputShard, ...]:
    """Ordered recipes in files of at most `shard_bytes` of data; a larger tensor has a file of its own.

    A layer is not cut where it fits into one file.
    """
    packed: list[list[Recipe]] = [[]]
    used = 0
    for group in _groups(recipes, shard_bytes):
        size = sum(output_bytes(recipe) for recipe in group)
        if packed[-1] and used + size > shard_bytes:
            packed.append([])
            used = 0
        packed[-1].extend(group)
        used += size
    return tuple(OutputShard(_file(n, len(packed)), tuple(group)) for n, group in enumerate(packed, 1))


def _groups(recipes: Sequence[Recipe], shard_bytes: int) -> Iterator[list[Recipe]]:
    """Layers whole where a file can hold one, every other tensor alone."""
    for layer, group in groupby(recipes, key=_layer):
        together = list(group)
        if layer and sum(output_bytes(recipe) for recipe in together) <= shard_bytes:
            yield together
        else:
            yield from ([recipe] for recipe in together)


def _layer(recipe: Recipe) -> str:
    match = _LAYER.match(recipe.name)
    return match[0] if match else ""


def _file(number: int, count: int) -> str:
    return SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def index(shards: Sequence[OutputShard]) -> dict[str, bytes]:
    """The index file by its name; none for a single shard."""
    if len(shards) == 1:
        return {}
    recipes = [recipe for shard in shards for recipe in shard.recipes]
    metadata = {
        "total_parameters": sum(prod(recipe.shape) for recipe in recipes),
        "total_size": sum(output_bytes(recipe) for recipe in recipes),
    }
    weight_map = {recipe.name: shard.file for shard in shards for recipe in shard.recipes}
    content = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    return {INDEX: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()}
