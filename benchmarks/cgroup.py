"""A control group with a memory limit of its own, for one process: what a container is to the kernel."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

ROOT = Path("/sys/fs/cgroup")


class Cgroup:
    """Made by `with` and removed again. Needs root and a writable hierarchy: OSError where there is none."""

    def __init__(self, limit_bytes: int) -> None:
        self._is_v2 = (ROOT / "cgroup.controllers").exists()
        self.folder = (ROOT if self._is_v2 else ROOT / "memory") / f"snugfit-benchmark-{os.getpid()}"
        self._limit = limit_bytes

    def __enter__(self) -> Cgroup:
        self.folder.mkdir()
        (self.folder / ("memory.max" if self._is_v2 else "memory.limit_in_bytes")).write_text(
            str(self._limit)
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.folder.rmdir()

    def join(self) -> None:
        """Put this process in; called in a child before it becomes the program."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int:
        """The most that the group used, page cache included, which the kernel takes back when it must."""
        name = "memory.peak" if self._is_v2 else "memory.max_usage_in_bytes"
        return int((self.folder / name).read_text())
