"""What is said when a model does not fit: what it needs, what there is, and a command that would work."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence

from loader.errors import BudgetExceeded

# What the offered --device and --budget stand for. The device is named even where it was typed: --gpu makes
# "auto" a GPU, and a budget alone would not.
MEMORY_FLAGS = ("--budget", "--max-memory", "--gpu", "--device")


def retry_command(command: str, argv: Sequence[str], err: BudgetExceeded) -> str:
    """`snugfit COMMAND` with the words of `argv`, but with the smallest budget that works."""
    memory = ["--device", err.device, "--budget", size_text(err.smallest_bytes)]
    words = ["snugfit", command, *_without_memory(argv), *memory]
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


def _without_memory(argv: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(argv)
    for word in words:
        if word in MEMORY_FLAGS:
            next(words, None)
        elif word.split("=")[0] not in MEMORY_FLAGS:
            kept.append(word)
    return kept


def size_text(n_bytes: int) -> str:
    """A size that `--budget` takes, never smaller than `n_bytes`: 7_883_112_448 -> "7.89GB"."""
    unit, name = (10**9, "GB") if n_bytes >= 10**9 else (10**6, "MB")
    step = max(1, 10 ** (len(str(n_bytes)) - 3))
    return f"{-(-n_bytes // step) * step / unit:g}{name}"
