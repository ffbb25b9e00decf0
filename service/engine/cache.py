"""KV caches that are allocated once: transformers' Cache with layers that write in place.

Masks come from transformers (masking_utils.py asks a layer for `get_mask_sizes` and `get_seq_length`), so the
layers here answer as its dynamic ones do; only where keys and values live is different.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from loader.arena import Arena, aligned

# Tokens moved at once when a window slides; a copy of them is the only temporary memory.
MOVE_TOKENS = 256


class CacheOverflow(Exception):
    """More tokens than the cache was made for; the scheduler should have known."""

    def __init__(self, tokens: int, capacity: int) -> None:
        self.tokens, self.capacity = tokens, capacity
        super().__init__(f"{tokens} tokens do not fit a KV cache of {capacity}")


class FixedLayer(CacheLayerMixin):
    """Full attention: keys and values [1, kv_heads, capacity, head_dim], filled from the front.

    Allocated at the first update, in the dtype and on the device of what is stored; kept by `reset`.
    """

    is_sliding = False

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0  # tokens seen
        self._stores: tuple[torch.Tensor, ...] = ()  # keys, values

    @property
    def n_bytes(self) -> int:
        return sum(store.nbytes for store in self._stores)

    def sizes(self, sample: FixedLayer) -> Counter[torch.device]:
        """Bytes by device of keys and values like those that `sample` holds."""
        return sum(
            (Counter({x.device: aligned(_n_bytes(x, self.capacity))}) for x in sample._stores), Counter()
        )

    def allocate(self, sample: FixedLayer, arenas: Mapping[torch.device, Arena]) -> None:
        """Take keys and values like those that `sample` holds, before there are any."""
        self._stores = tuple(
            arenas[x.device].take(_shape(x, self.capacity), x.dtype).zero_() for x in sample._stores
        )

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        if not self._stores:
            self._stores = tuple(_store(states, self.capacity) for states in (key_states, value_states))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store [1, kv_heads, new, head_dim]; give views of all that the new tokens may see.

        Raises CacheOverflow.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        start, first = self._make_room(new)
        self.length += new
        keys, values = self._stores
        keys[:, :, start : start + new] = key_states
        values[:, :, start : start + new] = value_states
        return keys[:, :, first : start + new], values[:, :, first : start + new]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that `update` will give for that many new tokens, and the position of the first."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        """-1, as the dynamic layer: the limit is the scheduler's business, not the model's."""
        return -1

    def seek(self, length: int) -> None:
        """Pretend that `length` tokens have been seen; their keys are whatever the memory holds."""
        self.length = length

    def reset(self) -> None:
        self.length = 0
        self.is_initialized = False  # some models take this as "the first forward of a sequence"

    def _make_room(self, new: int) -> tuple[int, int]:
        """Where the new tokens go, and the first stored token that they may see."""
        if self.length + new > self.capacity:
            raise CacheOverflow(self.length + new, self.capacity)
        return self.length, 0


class FixedSlidingLayer(FixedLayer):
    """Sliding window: room for the window and a chunk; when that is full, what is seen moves to the front.

    Gives what DynamicSlidingWindowLayer gives: the last `window - 1` tokens before the new ones, and those.
    """

    is_sliding = True

    def __init__(self, window: int, capacity: int) -> None:
        super().__init__(capacity)
        self.window = window
        self._end = 0  # one past the last stored token

    @property
    def _visible(self) -> int:
        return min(self.length, self.window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._visible + query_length, self.length - self._visible

    def get_max_length(self) -> int:
        return self.window

    def seek(self, length: int) -> None:
        self.length = length
        self._end = min(length, self.capacity)

    def reset(self) -> None:
        super().reset()
        self._end = 0

    def _make_room(self, new: int) -> tuple[int, int]:
        if self._visible + new > self.capacity:
            raise CacheOverflow(self._visible + new, self.capacity)
        if self._end + new > self.capacity:
            self._slide()
        start, self._end = self._end, self._end + new
        return start, start - self._visible

    def _slide(self) -> None:
        for store in self._stores:
            _move_to_front(store, self._end - self._visible, self._end)
        self._end = self._visible


class FixedCache(Cache):
    """One sequence's cache, as the model's config asks for, of which nothing grows.

    Layers of other kinds (linear attention, convolutions) are those of DynamicCache: their states have a
    constant size. The few kinds that hold tokens in yet another way stay dynamic.
    """

    def __init__(self, config: Any, context: int, chunk_tokens: int) -> None:
        super().__init__(
            layers=[_fixed(x, context, chunk_tokens) for x in DynamicCache(config=config).layers]
        )

    @property
    def n_bytes(self) -> int:
        """Bytes that are allocated now."""
        return sum(_layer_bytes(layer) for layer in self.layers)

    @property
    def seekable(self) -> bool:
        return all(
            isinstance(x, FixedLayer | DummyLayer) or type(x) is LinearAttentionLayer for x in self.layers
        )

    def seek(self, length: int) -> None:
        """Pretend that `length` tokens have been seen. For a rehearsal, after a first forward."""
        for layer in self.layers:
            if isinstance(layer, FixedLayer):
                layer.seek(length)
            elif isinstance(layer, LinearAttentionLayer):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, length > 0)


def allocated(
    sample: FixedCache, config: Any, context: int, chunk_tokens: int, count: int
) -> list[FixedCache]:
    """`count` caches, every layer of the shape, dtype and device that `sample` met in its first forward.

    Keys and values of all of them are parts of one buffer on each device: CUDA's caching allocator takes
    20 MiB for tensors of 1 to 10 MiB, so with layers of 8 MiB a fifth would be lost.
    """
    caches = [FixedCache(config, context, chunk_tokens) for _ in range(count)]
    sizes: Counter[torch.device] = Counter()
    for mine, met in _pairs(caches, sample):
        sizes.update(mine.sizes(met))
    arenas = {device: Arena(n_bytes, device) for device, n_bytes in sizes.items()}
    for mine, met in _pairs(caches, sample):
        mine.allocate(met, arenas)
    for cache in caches:
        for at, layer in enumerate(sample.layers):
            if not isinstance(layer, FixedLayer):
                cache.layers[at] = copy.deepcopy(layer)
    return caches


def _pairs(caches: list[FixedCache], sample: FixedCache) -> Iterator[tuple[FixedLayer, FixedLayer]]:
    for cache in caches:
        for mine, met in zip(cache.layers, sample.layers, strict=True):
            if isinstance(mine, FixedLayer) and isinstance(met, FixedLayer):
                yield mine, met


def _fixed(layer: Any, context: int, chunk_tokens: int) -> Any:
    if type(layer) is DynamicLayer:
        return FixedLayer(context)
    if type(layer) is DynamicSlidingWindowLayer:
        return FixedSlidingLayer(layer.sliding_window, min(context, layer.sliding_window + chunk_tokens))
    return layer


def _layer_bytes(layer: Any) -> int:
    if isinstance(layer, FixedLayer):
        return layer.n_bytes
    held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
    if isinstance(layer, LinearAttentionLayer):
        held += [*layer.conv_states.values(), *layer.recurrent_states.values()]
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def _store(states: torch.Tensor, capacity: int) -> torch.Tensor:
    """Zeros: every page is really there when memory is measured, and no NaN is among what a mask hides."""
    return states.new_zeros(_shape(states, capacity))


def _shape(states: torch.Tensor, capacity: int) -> torch.Size:
    return torch.Size((*states.shape[:2], capacity, states.shape[3]))


def _n_bytes(states: torch.Tensor, capacity: int) -> int:
    return _shape(states, capacity).numel() * states.itemsize


def _move_to_front(store: torch.Tensor, first: int, end: int) -> None:
    """Move tokens [first, end) to the front. Piece by piece and copied, because the ranges may overlap."""
    for at in range(first, end, MOVE_TOKENS):
        piece = store[:, :, at : min(at + MOVE_TOKENS, end)].clone()
        store[:, :, at - first : at - first + piece.shape[2]] = piece
