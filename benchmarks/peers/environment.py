"""A virtual environment for each peer, made when it is missing, outside of ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INSTALL_SECONDS = 3600
FINISHED = "installed"  # a file in the environment's folder; without it the folder is made anew
LAST_LINES = 3


class CannotRun(Exception):
    """This peer cannot be installed, started or measured here; the message is its row in the table."""


def python_of(folder: Path, steps: Sequence[Sequence[str]]) -> Path:
    """The interpreter of the environment in `folder`. Each step is a command line after `python`.

    Raises CannotRun with the last words of the step that failed.
    """
    python = folder.absolute() / "bin" / "python"
    marker = folder / FINISHED
    recipe = repr(steps)
    if marker.exists() and marker.read_text() == recipe:
        return python
    print(f"installing into {folder} …", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    for step in steps:
        _run([str(python), *step])
    marker.write_text(recipe)
    return python


def _run(command: Sequence[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise CannotRun(f"not installed: {err}") from err
    if done.returncode:
        words = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise CannotRun("not installed: " + " ".join(words[-LAST_LINES:]))
