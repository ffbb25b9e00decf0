"""Who runs, who waits, who is next. No torch, no clock, no thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from service.engine.kv import KvSlots
from service.engine.sequence import Sequence


class Scheduler:
    """First come, first served into the KV slots; those that run take turns, a step each."""

    def __init__(self, slots: KvSlots) -> None:
        self._slots = slots
        self._waiting: deque[Sequence] = deque()
        self._running: deque[Sequence] = deque()

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def __iter__(self) -> Iterator[Sequence]:
        """All that run and wait, as of now."""
        return iter([*self._running, *self._waiting])

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Give free slots to those who have waited longest; they run from now on."""
        admitted = []
        while self._waiting and (slot := self._slots.take()) is not None:
            sequence = self._waiting.popleft()
            sequence.slot = slot
            self._running.append(sequence)
            admitted.append(sequence)
        return admitted

    def next(self) -> Sequence | None:
        """Whose turn it is; it goes to the end of the line."""
        if not self._running:
            return None
        self._running.rotate(-1)
        return self._running[-1]

    def remove(self, sequence: Sequence) -> None:
        """Take out one that is here, and its slot from it."""
        if sequence.slot is None:
            self._waiting.remove(sequence)
            return
        self._running.remove(sequence)
        self._slots.give_back(sequence.slot)
        sequence.slot = None
