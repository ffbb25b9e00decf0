"""What an export says while it runs: a bar on a terminal, lines of JSON for whoever collects logs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_SECONDS = 5.0

# (bytes done, bytes in all, the shard that is being written)
Report = Callable[[int, int, str], None]


@contextmanager
def shown(stream: TextIO) -> Iterator[Report]:
    """A callback that shows how far an export is, on `stream` (stderr)."""
    console = Console(file=stream)
    with _bar(console) if console.is_terminal else _lines(stream) as report:
        yield report


@contextmanager
def _bar(console: Console) -> Iterator[Report]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("merging", total=None)

        def report(done_bytes: int, total_bytes: int, shard: str) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes, description=shard)

        yield report


@contextmanager
def _lines(stream: TextIO) -> Iterator[Report]:
    due = time.monotonic() + LINE_SECONDS

    def report(done_bytes: int, total_bytes: int, shard: str) -> None:
        nonlocal due
        if time.monotonic() >= due or done_bytes == total_bytes:
            due = time.monotonic() + LINE_SECONDS
            event(stream, "progress", done_bytes=done_bytes, total_bytes=total_bytes, shard=shard)

    yield report


def event(stream: TextIO, name: str, **facts: Any) -> None:
    """One line of JSON: {"event": "progress", …}."""
    print(json.dumps({"event": name, **facts}, ensure_ascii=False), file=stream, flush=True)
