"""`python -m exporter [export] …` and `python -m exporter verify …`: what a container and `snugfit` run.

Every way to fail is a sentence on stderr, an exit code (docs/architecture.md lists them) and, where
Kubernetes has put a termination log, the same sentence there.
"""

from __future__ import annotations

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from exporter.errors import Stopped
from loader.errors import (
    EXIT_BAD_INPUT,
    EXIT_DOES_NOT_FIT,
    EXIT_INTERRUPTED,
    EXIT_RETRY,
    EXIT_USAGE,
    LoaderError,
)
from loader.usage import UsageError, never_fail_on_a_character

COMMANDS = {"export": "exporter.command", "verify": "exporter.verify_command"}
# Where Kubernetes reads why a container ended (terminationMessagePath, its default).
TERMINATION_LOG = Path("/dev/termination-log")
OUT_OF_MEMORY = "out of memory: give the container more, 1GiB is enough for any model."
TORCH_OUT_OF_MEMORY = "can't allocate memory"  # all that its RuntimeError differs in
KEPT = "Finished shards are kept: the same command goes on from there."

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv.pop(0) if argv and argv[0] in COMMANDS else "export"
    if not hasattr(os, "preadv"):
        return _end(EXIT_USAGE, "snugfit export needs Linux or macOS.")
    signal.signal(signal.SIGTERM, _stop)
    never_fail_on_a_character()
    try:
        code: int = importlib.import_module(COMMANDS[name]).run(argv)
        return code
    except UsageError as err:
        return _end(err.exit_code, *err.problems)
    except LoaderError as err:
        return _end(err.exit_code, str(err))
    except KeyboardInterrupt:
        return _end(EXIT_INTERRUPTED, f"stopped. {KEPT}")
    except MemoryError:
        return _end(EXIT_DOES_NOT_FIT, OUT_OF_MEMORY)
    except RuntimeError as err:
        if TORCH_OUT_OF_MEMORY in str(err):
            return _end(EXIT_DOES_NOT_FIT, OUT_OF_MEMORY)
        raise
    except OSError as err:
        return _end(*_disk_error(err))


def _stop(_signal: int, _frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the tidying short
    raise Stopped(f"stopped by SIGTERM. {KEPT}")


def _disk_error(err: OSError) -> tuple[int, str]:
    where = f" ({err.filename})" if err.filename else ""
    if err.errno in _FULL:
        return EXIT_DOES_NOT_FIT, f"the disk is full{where}. {KEPT}"
    if err.errno in _FORBIDDEN:
        return EXIT_BAD_INPUT, f"{err.strerror}{where}"
    return EXIT_RETRY, f"{err.strerror or err}{where}. {KEPT}"


def _end(code: int, *problems: str) -> int:
    for problem in problems:
        print(f"snugfit: error: {problem}", file=sys.stderr)
    if TERMINATION_LOG.exists():
        with suppress(OSError):  # not a reason for another exit code
            TERMINATION_LOG.write_text("\n".join(problems)[:4096], encoding="utf-8")  # Kubernetes cuts there
    return code


if __name__ == "__main__":
    sys.exit(main())
