"""Which request holds which KV cache, and how much of it. Accounting only, no torch."""

from __future__ import annotations


class KvSlots:
    """`count` slots of `context` tokens each. A request holds one from admission to its end."""

    def __init__(self, count: int, context: int) -> None:
        self.context = context
        self._free = list(range(count - 1, -1, -1))
        self._tokens: dict[int, int] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def tokens_used(self) -> int:
        """Tokens in all slots that are held."""
        return sum(self._tokens.values())

    def take(self) -> int | None:
        """A free slot, empty; None when all are held."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._tokens[slot] = 0
        return slot

    def fill(self, slot: int, tokens: int) -> None:
        """Count tokens into a held slot."""
        self._tokens[slot] += tokens

    def give_back(self, slot: int) -> None:
        """Raises KeyError for a slot that is not held: giving one back twice would lend it twice."""
        del self._tokens[slot]
        self._free.append(slot)
