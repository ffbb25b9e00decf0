"""Ends an answer at a stop string, also when it comes in pieces."""

from __future__ import annotations


class StopStrings:
    """Passes text on, but holds back what may still become a stop string.

    The match that is complete first wins; of those complete at the same character, the longest. So the result
    does not depend on how the text is cut into pieces. The stop string itself is never passed on.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def push(self, text: str, may_end: bool = True) -> str:
        """Take more text, give what may be shown. After a match `found` is True and nothing more comes.

        A stop string that is completed by text with `may_end=False` is text like any other; one that such
        text only begins is still found.
        """
        if self.found:
            return ""
        if not self._stops:
            return text
        known, text = len(self._held), self._held + text
        start = self._match(text, known) if may_end else None
        if start is not None:
            self.found, self._held = True, ""
            return text[:start]
        cut = len(text) - self._undecided(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What was held back; for the end of an answer."""
        held, self._held = self._held, ""
        return held

    def _match(self, text: str, known: int) -> int | None:
        """Where the winning match begins, of those that end after the first `known` characters."""
        ends = [
            (at + len(stop), at)
            for stop in self._stops
            if (at := text.find(stop, max(0, known - len(stop) + 1))) >= 0
        ]
        return min(ends)[1] if ends else None

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        return max((_overlap(text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
