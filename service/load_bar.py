"""How reading weights is shown to whoever started the service: a bar on a terminal, else lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from service import logs
from service.show import size

log = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines in the log

Report = Callable[[int, int], None]


@contextmanager
def shown(report: Report, console: Console | None = None) -> Iterator[Report]:
    """A callback for `loader.load` that calls `report` and shows how far it is; its end is logged.

    `console` is stderr unless given.
    """
    console = console or Console(stderr=True)
    started, read_bytes = 0.0, 0

    def count(done_bytes: int, total_bytes: int) -> None:
        nonlocal started, read_bytes
        started = started or time.monotonic()  # not before: the model's class is imported first
        read_bytes = done_bytes
        report(done_bytes, total_bytes)

    with_bar = console.is_terminal and not logs.are_json()
    with _bar(count, console) if with_bar else _lines(count) as callback:
        yield callback
    seconds = time.monotonic() - started
    speed = size(int(read_bytes / seconds))
    log.info("read %s of weights in %.1f s (%s/s)", size(read_bytes), seconds, speed)


@contextmanager
def _bar(report: Report, console: Console) -> Iterator[Report]:
    columns = (
        TextColumn("weights"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("weights", total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            report(done_bytes, total_bytes)
            bar.update(task, completed=done_bytes, total=total_bytes)

        yield show


@contextmanager
def _lines(report: Report) -> Iterator[Report]:
    due = time.monotonic() + LINE_SECONDS

    def show(done_bytes: int, total_bytes: int) -> None:
        nonlocal due
        report(done_bytes, total_bytes)
        if time.monotonic() >= due:
            due = time.monotonic() + LINE_SECONDS
            log.info("reading weights: %s of %s", size(done_bytes), size(total_bytes))

    yield show
