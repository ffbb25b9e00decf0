"""How the KV cache is cut into blocks: what the plan decides, the engine counts and the runner allocates."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvGroup:
    """Decoder layers that see the same tokens, so that one block table per sequence serves all of them."""

    window: int | None  # tokens that a layer sees, the newest included; None: all
    layers: tuple[int, ...]  # their indices in the model
    blocks: int  # that sequences share; one more is allocated, for rows that only fill a batch up

    def blocks_for(self, tokens: int, chunk_tokens: int, block_tokens: int) -> int:
        """The most blocks that one sequence of `tokens` holds at any time.

        A sliding layer keeps what the oldest token of a chunk still sees, and the chunk. Where these begin
        and end within their blocks is not known, so two parts of a block are counted as whole.
        """
        whole = -(-tokens // block_tokens)
        if self.window is None:
            return whole
        return min(whole, -(-(self.window - 1 + chunk_tokens) // block_tokens) + 1)


@dataclass(frozen=True, slots=True)
class KvLayout:
    """The pool: `block_tokens` tokens in each block; a group for each different window."""

    block_tokens: int
    groups: tuple[KvGroup, ...]

    @property
    def tokens(self) -> int:
        """That fit in the pool at the same time: of the first group, which sees the furthest."""
        return self.groups[0].blocks * self.block_tokens
