"""The folder in which an export grows, beside the one it becomes: a lock, a journal of finished shards.

Nothing is visible under the output's name until the whole is there: the last step is a rename. An export
that is killed leaves its staging folder; the next run of the same plan goes on behind the last shard in the
journal.

    .NAME.snugfit-export/lock
    .NAME.snugfit-export/journal.jsonl
    .NAME.snugfit-export/model/…        becomes NAME
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from exporter.errors import Busy
from exporter.fingerprint import problem
from exporter.merge import Change
from exporter.writer import Written, sync

JOURNAL, LOCK, MODEL, OLD = "journal.jsonl", "lock", "model", "old"
HASHING_THREADS = 2


@dataclass(frozen=True, slots=True)
class Finished:
    """A shard in the journal: what was written, and what merging changed in it."""

    written: Written
    changes: tuple[Change, ...]


def staging_folder(out: Path) -> Path:
    return out.parent / f".{out.name}.snugfit-export"


class Staging:
    """The staging folder of one plan, locked. `finished` are shards of an earlier run that can be kept."""

    def __init__(
        self,
        out: Path,
        plan_sha256: str,
        sizes: Mapping[str, int],
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._root = staging_folder(out)
        self.folder = self._root / MODEL
        self.finished: dict[str, Finished] = {}
        self._out = out
        self._plan = plan_sha256
        self._sizes = sizes
        self._say = say

    def __enter__(self) -> Staging:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(self._root / LOCK)
        try:
            self._resume()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def record(self, finished: Finished) -> None:
        """Put a shard that is on the disk into the journal."""
        with (self._root / JOURNAL).open("ab") as stream:
            _write_through(stream, _line(_described(finished)))
        self.finished[finished.written.file] = finished

    def write(self, name: str, content: bytes) -> Written:
        """A small file, whole and on the disk."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as stream:
            _write_through(stream, content)
        return Written(name, len(content), sha256(content).hexdigest())

    def publish(self) -> None:
        """Give the model its final name, in place of an older one, and remove the rest.

        Whoever calls it has seen that what stands there may go.
        """
        sync(self.folder)
        with _undisturbed():
            if self._out.exists() and any(self._out.iterdir()):
                shutil.rmtree(self._root / OLD, ignore_errors=True)
                self._out.rename(self._root / OLD)
            self.folder.rename(self._out)  # onto an empty folder too, as rename(2) allows
            sync(self._out.parent)
            shutil.rmtree(self._root)

    # The journal

    def _resume(self) -> None:
        lines = _lines(self._root / JOURNAL)
        if lines and lines[0] == {"plan": self._plan}:
            kept = self._intact(_finished(lines[1:]))
            self.finished = {finished.written.file: finished for finished in kept}
        else:
            if lines:
                self._say(f"{self._root}: held the beginning of another export, which is removed")
            self._clear()
        self._rewrite()

    def _intact(self, kept: Sequence[Finished]) -> list[Finished]:
        """Those whose file still has the size and the hash that were written."""
        if kept:
            self._say(f"checking {len(kept)} shards of an earlier run")
        known = [f for f in kept if self._sizes.get(f.written.file) == f.written.n_bytes]
        with ThreadPoolExecutor(HASHING_THREADS) as pool:
            same = list(pool.map(lambda f: not problem(self.folder, f.written), known))
        return [f for f, is_same in zip(known, same, strict=True) if is_same]

    def _rewrite(self) -> None:
        """The journal without what is not kept; whole at every moment, so that a kill here loses nothing."""
        lines = [{"plan": self._plan}, *(_described(finished) for finished in self.finished.values())]
        new = self._root / f"{JOURNAL}.new"
        with new.open("wb") as stream:
            _write_through(stream, b"".join(_line(line) for line in lines))
        new.replace(self._root / JOURNAL)

    def _clear(self) -> None:
        (self._root / JOURNAL).unlink(missing_ok=True)
        for folder in (self.folder, self._root / OLD):
            shutil.rmtree(folder, ignore_errors=True)
        self.folder.mkdir()


def _lines(journal: Path) -> list[dict[str, Any]]:
    """The lines of a journal up to the first that was cut short."""
    try:
        text = journal.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content).encode() + b"\n"


def _described(finished: Finished) -> dict[str, Any]:
    return {"written": asdict(finished.written), "changes": [asdict(change) for change in finished.changes]}


def _write_through(stream: BinaryIO, content: bytes) -> None:
    """Write, and wait until it is on the disk."""
    stream.write(content)
    stream.flush()
    os.fsync(stream.fileno())


def _finished(lines: Iterable[Mapping[str, Any]]) -> list[Finished]:
    """The shards of a journal, up to a line that another version of snugfit has written."""
    found: list[Finished] = []
    for line in lines:
        try:
            changes = tuple(Change(**change) for change in line["changes"])
            found.append(Finished(Written(**line["written"]), changes))
        except (KeyError, TypeError):
            break
    return found


def _lock(path: Path) -> int:
    """The lock's descriptor; the system gives the lock back when the process ends, however it ends."""
    import fcntl

    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise Busy(
            f"{path.parent}: another export is writing there. Wait for it, or give another --out."
        ) from None
    return descriptor


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove_leftover(out: Path) -> None:
    """A staging folder beside a finished export: its run was killed between the rename and the end."""
    root = staging_folder(out)
    if root.exists():
        lock = _lock(root / LOCK)
        shutil.rmtree(root)
        os.close(lock)
