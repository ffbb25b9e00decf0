"""A model's files, wherever they are, and those of a folder on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from loader.headers import (
    LENGTH_BYTES,
    POINTER_BYTES,
    TensorInfo,
    header_length,
    parse_header,
    refuse_lfs_pointer,
)


class ModelFiles(Protocol):
    """What reading a checkpoint needs of the place where its files are."""

    source: str  # what the user typed, for messages
    path: Path | None  # the local folder, when it is one
    commit: str | None  # of a hub model
    names: frozenset[str]  # of the files at the top

    def read(self, name: str) -> bytes:
        """A small file, whole. Raises LfsPointer when it is one."""
        ...

    def tensors(self, names: list[str]) -> list[TensorInfo]:
        """The headers of these shards in turn. Raises BadHeader, TruncatedShard or LfsPointer."""
        ...


class Folder:
    """A model's folder on this machine."""

    def __init__(self, source: str, path: Path, commit: str | None = None) -> None:
        self.source = source
        self.path: Path | None = path
        self.commit = commit
        self._path = path
        self.names = frozenset(entry.name for entry in path.iterdir() if entry.is_file())

    def read(self, name: str) -> bytes:
        content = (self._path / name).read_bytes()
        refuse_lfs_pointer(content[:POINTER_BYTES], str(self._path / name))
        return content

    def tensors(self, names: list[str]) -> list[TensorInfo]:
        return [info for name in names for info in read_header(self._path / name)]


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file. Raises BadHeader, TruncatedShard or LfsPointer."""
    where, size = str(file), file.stat().st_size
    with file.open("rb") as stream:
        length = header_length(stream.read(min(size, POINTER_BYTES)), size, where)
        stream.seek(LENGTH_BYTES)
        return parse_header(stream.read(length), file.name, size, where)
