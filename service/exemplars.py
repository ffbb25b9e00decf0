"""The last requests that were traced, as examples of what the histograms count."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

KEPT = 64  # of each histogram


@dataclass(frozen=True, slots=True)
class Example:
    """One observation of one traced request."""

    seconds: float  # as the HTTP layer saw it; the engine's own figure is a moment shorter
    trace_id: str
    at: float  # seconds since the epoch


class Exemplars:
    """Written on the event loop, read by a scrape's thread."""

    def __init__(self) -> None:
        self._examples: dict[str, deque[Example]] = {}

    def note(self, histogram: str, seconds: float, trace_id: str) -> None:
        """`histogram` is an attribute of EngineStats."""
        examples = self._examples.setdefault(histogram, deque(maxlen=KEPT))
        examples.append(Example(seconds, trace_id, time.time()))

    def newest(self, histogram: str) -> tuple[Example, ...]:
        """The oldest of them first."""
        return tuple(self._examples.get(histogram, ()))
