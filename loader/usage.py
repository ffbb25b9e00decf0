"""How a command line is refused: a line per mistake, the nearest right name, exit code 2."""

from __future__ import annotations

import argparse
import difflib
import io
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from typing import Any, NoReturn

from loader.errors import EXIT_USAGE

NOT_INSTALLED = "(not installed: run from its source folder)"


class UsageError(Exception):
    """The command line or the configuration cannot be used. `problems` holds a sentence for each mistake."""

    exit_code = EXIT_USAGE

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean NAME?" when some known name is near, else ""."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


class Parser(argparse.ArgumentParser):
    """argparse that raises UsageError, names the nearest flag and never guesses from an abbreviation."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Help, **options})
        self.add_argument("--version", action="version", version=f"snugfit {version()}")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        known, rest = self.parse_known_args(argv)
        if rest:
            raise UsageError(f"{word}: not understood{self.nearest(word.split('=')[0])}" for word in rest)
        return known

    def nearest(self, word: str) -> str:
        return nearest(word, [flag for action in self._actions for flag in action.option_strings])

    def error(self, message: str) -> NoReturn:
        raise UsageError([message])


def version() -> str:
    try:
        return metadata.version("snugfit")
    except metadata.PackageNotFoundError:
        return NOT_INSTALLED


def never_fail_on_a_character() -> None:
    """A terminal that cannot show a character (cp1252 on Windows) gets a ? and not a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


class _Help(argparse.HelpFormatter):
    """A first column wide enough for most flags, so that a description starts beside its flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
