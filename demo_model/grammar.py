"""Phrases with choices: `[a|b|]` picks one, `{x}` is a list or a value, both nest."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

Value = str | Sequence[str] | Callable[[], str]
_INNERMOST = re.compile(r"\[([^\[\]]*)\]|\{(\w+)\}")


def phrase(rng: random.Random, pattern: str, values: Mapping[str, Value]) -> str:
    """One wording of a pattern. A list is picked from, a function is called, and either may give a pattern.

    Raises KeyError for a `{x}` that `values` lacks.
    """

    def pick(match: re.Match[str]) -> str:
        if match[2] is None:
            return rng.choice(match[1].split("|"))
        value = values[match[2]]
        if isinstance(value, str):
            return value
        return value() if callable(value) else rng.choice(value)

    # Innermost first, so that a choice may hold choices; what a list gave is expanded in the next round.
    while _INNERMOST.search(pattern):
        pattern = _INNERMOST.sub(pick, pattern)
    return pattern
