"""Writes the shards: one thread hashes, one writes, one waits for the disk, while the next blocks are merged.

Blocks are rounded straight into a few buffers that are used again and again, so that the memory this takes is
the same for every model.
"""

from __future__ import annotations

import hashlib
import os
import queue
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

BUFFER_BYTES = 4 * 2**20
BUFFERS = 16
# Written pages go to the disk all the time and not at the end: in a container, pages that are still to be
# written count as memory.
SYNC_BYTES = 128 * 2**20

fdatasync = getattr(os, "fdatasync", os.fsync)  # macOS has none


def sync(path: Path) -> None:
    """Wait until a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Written:
    """A finished file."""

    file: str
    n_bytes: int
    sha256: str


@dataclass
class _File:
    """The file that is being written. Each method belongs to one of the writer's threads."""

    path: Path
    descriptor: int = -1
    sha256: Any = field(default_factory=hashlib.sha256)
    n_bytes: int = 0
    unsynced_bytes: int = 0

    def write(self, content: memoryview) -> None:
        if self.descriptor < 0:  # opened this late, so that the file before it is finished by then
            self.descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        while len(content):
            done = os.write(self.descriptor, content)
            content = content[done:]
            self.n_bytes += done
            self.unsynced_bytes += done

    def finish(self) -> Written:
        """When all of it is written and hashed."""
        os.fsync(self.descriptor)
        self.close()
        return Written(self.path.name, self.n_bytes, self.sha256.hexdigest())

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class Writer:
    """One file after the other into one folder. Used by `with`; the disk's OSError surfaces in any call."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._syncing = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._synced: Future[None] | None = None
        self._pending: deque[Future[Any]] = deque()
        self._free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self._made = 0
        self._buffer: torch.Tensor | None = None
        self._used_bytes = 0
        self._file: _File | None = None

    def begin(self, name: str, header: bytes) -> None:
        """Open the next file; what stood there under that name is gone."""
        self._file = _File(self._folder / name)
        self._hand_over(self._file, memoryview(header), None)

    def room(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """[rows, columns] to fill before the next call of `room` or `finish`, which may hand it on."""
        n_bytes = rows * columns * dtype.itemsize
        if self._buffer is not None and not self._has_room(n_bytes, dtype.itemsize):
            self._flush()
        if self._buffer is None:
            self._buffer = self._take(n_bytes)
        start = self._used_bytes
        self._used_bytes += n_bytes
        return self._buffer[start : self._used_bytes].view(dtype).view(rows, columns)

    def _has_room(self, n_bytes: int, item_bytes: int) -> bool:
        assert self._buffer is not None
        return self._used_bytes % item_bytes == 0 and self._used_bytes + n_bytes <= self._buffer.numel()

    def finish(self, done: Callable[[Written], None]) -> None:
        """Flush and fsync the file, then call `done` in the writing thread, before anything of the next file.

        Returns at once: the next file's first blocks are merged while the disk catches up.
        """
        assert self._file is not None
        self._flush()
        file, self._file = self._file, None
        self._submit(self._finish, file, done)

    def wait(self) -> None:
        """Until everything is on the disk."""
        while self._pending:
            self._pending.popleft().result()

    def _flush(self) -> None:
        buffer, used, self._buffer, self._used_bytes = self._buffer, self._used_bytes, None, 0
        if buffer is not None and self._file is not None:
            content: Any = buffer.numpy()
            self._hand_over(self._file, memoryview(content)[:used], buffer)

    def _hand_over(self, file: _File, content: memoryview, buffer: torch.Tensor | None) -> None:
        """Hash and write at the same time; the buffer is free when both are done."""
        hashed = self._hashing.submit(file.sha256.update, content)
        self._submit(self._write, file, content, hashed, buffer)

    def _write(
        self, file: _File, content: memoryview, hashed: Future[None], buffer: torch.Tensor | None
    ) -> None:
        file.write(content)
        if file.unsynced_bytes >= SYNC_BYTES and (self._synced is None or self._synced.done()):
            self._raise_sync_failure()
            file.unsynced_bytes = 0
            self._synced = self._syncing.submit(fdatasync, file.descriptor)
        hashed.result()
        if buffer is not None and buffer.numel() == BUFFER_BYTES:
            self._free.put(buffer)

    def _finish(self, file: _File, done: Callable[[Written], None]) -> None:
        self._raise_sync_failure()
        done(file.finish())

    def _raise_sync_failure(self) -> None:
        """The system tells a failed write once: a later fsync of the same file would succeed."""
        if self._synced is not None:
            self._synced.result()
            self._synced = None

    def _take(self, n_bytes: int) -> torch.Tensor:
        """A free buffer; waits for the disk when all are full. A row larger than a buffer has its own."""
        import torch

        if n_bytes > BUFFER_BYTES:
            return torch.empty(n_bytes, dtype=torch.uint8)
        if self._made < BUFFERS:
            self._made += 1
            return torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        while True:
            self._raise_failures()
            try:
                return self._free.get(timeout=1.0)  # not for ever: a failed write gives no buffer back
            except queue.Empty:
                continue

    def _submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self._raise_failures()
        future = self._writing.submit(call, *arguments)
        self._pending.append(future)
        return future

    def _raise_failures(self) -> None:
        while self._pending and self._pending[0].done():
            self._pending.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Who is stopped still finishes what is in the buffers: that may be the end of a whole shard.
        is_disk_broken = kind is not None and issubclass(kind, OSError)
        for thread in (self._hashing, self._writing, self._syncing):
            thread.shutdown(wait=True, cancel_futures=is_disk_broken)
        if self._file is not None:
            self._file.close()
