"""What a step says when it did not pass."""

from __future__ import annotations


class Failed(Exception):
    """A step found something wrong; the message says what."""


class Skipped(Exception):
    """A step could not run here; the message says what is missing and how to get it."""


def need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)
