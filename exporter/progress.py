"""What an export says while it runs: a bar on a terminal, lines of JSON for whoever collects logs."""

from __future__ import annotations

import json
import os
import time
from types import TracebackType
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

from exporter.listener import Listener

LINE_SECONDS = 5.0


class JsonLines(Listener):
    """One JSON object per line, for whoever collects logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._due = time.monotonic() + LINE_SECONDS

    def progress(self, done_bytes: int, total_bytes: int, shard: str) -> None:
        if time.monotonic() >= self._due or done_bytes == total_bytes:
            self._due = time.monotonic() + LINE_SECONDS
            event(self._stream, "progress", done_bytes=done_bytes, total_bytes=total_bytes, shard=shard)

    def say(self, sentence: str) -> None:
        event(self._stream, "note", text=sentence)


class Bar(Listener):
    """A bar on a terminal; used by `with`."""

    def __init__(self, stream: TextIO) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
            TimeRemainingColumn(),
        )  # fmt: skip
        self._bar = Progress(*columns, console=Console(file=stream), transient=True)
        self._task = self._bar.add_task("merging", total=None)

    def progress(self, done_bytes: int, total_bytes: int, shard: str) -> None:
        self._bar.update(self._task, completed=done_bytes, total=total_bytes, description=shard)

    def say(self, sentence: str) -> None:
        self._bar.console.print(sentence, highlight=False, soft_wrap=True)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def event(stream: TextIO, name: str, **facts: Any) -> None:
    """One line of JSON, in ASCII whatever the locale: {"event": "progress", …}."""
    tell(stream, json.dumps({"event": name, **facts}))


def tell(stream: TextIO, text: str) -> None:
    """Print. Nobody may be listening any more (`| head`), which is no reason to end an export."""
    try:
        print(text, file=stream, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
