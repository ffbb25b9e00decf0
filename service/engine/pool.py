"""The KV pool: keys and values of every layer, as views of one buffer on each device."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from loader.arena import Arena, aligned
from loader.kv_layout import KvLayout

Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of keys and of values


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a layer gives its attention, found in a first forward."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    softcap: float | None


@dataclass(frozen=True, slots=True)
class LayerStore:
    """Keys and values of one layer for all sequences; how a block lies in memory is the backend's affair."""

    keys: torch.Tensor
    values: torch.Tensor
    group: int  # of the layout: whose block tables say where a sequence's tokens are
    window: int | None  # tokens that a token sees, itself included; None: all before it
    block_tokens: int


def allocate(
    layout: KvLayout, layers: Mapping[int, LayerShape], shapes: Callable[[int, LayerShape, int], Shapes]
) -> dict[int, LayerStore]:
    """Zeros for every layer of the layout: each page is really there when memory is measured, and no NaN is
    among what a mask hides.

    `shapes(layer, its shape, blocks)` are those of the layer's keys and values. In each group there is a
    block more than sequences share: rows that only fill a batch up write to it.
    """
    wanted = {
        index: (at, shapes(index, layers[index], group.blocks + 1))
        for at, group in enumerate(layout.groups)
        for index in group.layers
    }
    sizes: Counter[torch.device] = Counter()
    for index, (_, both) in wanted.items():
        item_bytes = layers[index].dtype.itemsize
        sizes[layers[index].device] += sum(aligned(torch.Size(x).numel() * item_bytes) for x in both)
    # With huge pages 0.8 GB took 2.5 s instead of 0.9, and steps of 8,000 tokens a row were no faster.
    arenas = {device: Arena(n_bytes, device, huge_pages=False) for device, n_bytes in sizes.items()}
    stores = {}
    for index, (at, both) in wanted.items():
        keys, values = (_take(arenas, layers[index], shape) for shape in both)
        stores[index] = LayerStore(keys, values, at, layout.groups[at].window, layout.block_tokens)
    return stores


def _take(arenas: Mapping[torch.device, Arena], layer: LayerShape, shape: tuple[int, ...]) -> torch.Tensor:
    return arenas[layer.device].take(torch.Size(shape), layer.dtype).zero_()
