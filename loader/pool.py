"""Cuts the KV cache into blocks and counts their bytes. No torch.

Layers that see the same tokens are a group with one block table per sequence. The group that sees the
furthest comes first, and the pool is as large as it is; the others need no more blocks than that, nor more
than all rows can hold in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from loader.footprint import LayerCache
from loader.kv_layout import KvGroup, KvLayout

# FlashAttention-2's paged KV takes multiples of 256 tokens; on the CPU small blocks share prefixes better.
CPU_BLOCK_TOKENS, CUDA_BLOCK_TOKENS = 32, 256


class Needs(Protocol):
    """What of a setting the pool depends on."""

    @property
    def chunk(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def blocks(self) -> int | None: ...


@dataclass(frozen=True)
class PoolRule:
    """The pool of one model on one kind of device, for any setting."""

    layers: tuple[LayerCache, ...]
    block_tokens: int
    continuous: bool  # False: the model's own cache, for one sequence
    _windows: tuple[int | None, ...] = field(init=False)  # the furthest first

    def __post_init__(self) -> None:
        windows = {layer.window for layer in self.layers}
        furthest_first = sorted(windows, key=lambda window: -window if window else float("-inf"))
        object.__setattr__(self, "_windows", tuple(furthest_first) if self.continuous else (None,))

    def least_blocks(self, context: int, chunk: int) -> int:
        """Of the first group, for one sequence of `context` tokens read `chunk` tokens at a time."""
        return self._of_one(self._windows[0], context, chunk)

    def blocks(self, setting: Needs) -> int:
        """Of the first group."""
        least = self.least_blocks(setting.context, setting.chunk)
        return least if setting.blocks is None else setting.blocks

    def layout(self, setting: Needs) -> KvLayout:
        groups = (
            KvGroup(window, self._layers_with(window), self._blocks_with(window, setting))
            for window in self._windows
        )
        return KvLayout(self.block_tokens, tuple(groups))

    def layer_bytes(self, layer: LayerCache, setting: Needs) -> int:
        """Keys and values, or states, of all sequences in one layer."""
        if not self.continuous:
            return layer.n_bytes(setting.context, setting.chunk)
        # One block more, for rows that only fill a batch up.
        tokens = (self._blocks_with(layer.window, setting) + 1) * self.block_tokens
        return tokens * layer.bytes_per_token

    def n_bytes(self, setting: Needs) -> int:
        return sum(self.layer_bytes(layer, setting) for layer in self.layers)

    def _layers_with(self, window: int | None) -> tuple[int, ...]:
        return tuple(i for i, x in enumerate(self.layers) if x.window == window or not self.continuous)

    def _blocks_with(self, window: int | None, setting: Needs) -> int:
        all_rows = setting.concurrency * self._of_one(window, setting.context, setting.chunk)
        return min(self.blocks(setting), all_rows)

    def _of_one(self, window: int | None, context: int, chunk: int) -> int:
        return KvGroup(window, (), 0).blocks_for(context, chunk, self.block_tokens)


def rule_for(layers: Sequence[LayerCache], continuous: bool, device: str) -> PoolRule:
    tokens = CPU_BLOCK_TOKENS if device == "cpu" else CUDA_BLOCK_TOKENS
    return PoolRule(tuple(layers), tokens, continuous)
