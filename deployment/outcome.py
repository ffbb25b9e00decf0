"""What a step of `make chart`, `make image` and `make play` says: a line, and whether it passed."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import httpx


class Failed(Exception):
    """A step found something wrong; the message says what."""


class Skipped(Exception):
    """A step could not run here; the message says what is missing and how to get it."""


def need(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def told(name: str, step: Callable[..., str], *arguments: object) -> str:
    """The line of a step: what it returned, or why it did not. Whoever does not answer has failed."""
    try:
        return f"ok       {name}: {step(*arguments)}"
    except Skipped as err:
        return f"SKIPPED  {name}: {err}"
    except (Failed, httpx.HTTPError) as err:
        return f"FAILED   {name}: {err}"


def exit_code(lines: Iterable[str]) -> int:
    """Prints each line as it comes; 1 when a step failed."""
    failed = False
    for line in lines:
        failed |= line.startswith("FAILED")
        print(line, flush=True)
    return int(failed)
