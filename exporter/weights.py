"""What an export reads: tensors in files, seen as matrices and read in blocks of rows.

Every tensor is a matrix here. Its columns are its last dimension and its rows all others together; a vector
of n numbers has n rows of one column. So a row is what one output of a linear layer is computed from, in
every format, and a block of rows is what is read, merged and written at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from loader.errors import TruncatedShard
from loader.headers import TensorInfo

if TYPE_CHECKING:
    import torch

# (first row, row after the last) -> those rows, [rows, columns]. What it returns may be overwritten by the
# next call.
ReadRows = Callable[[int, int], "torch.Tensor"]

# In fp32 a block and its temporaries stay in a core's L2 cache.
BLOCK_ELEMENTS = 256 * 1024


# An adapter of stacked experts has two matrices for gate and up, and two for down.
KEPT_TENSORS = 4


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of a tensor of this shape."""
    return (prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (prod(shape), 1)


def row_blocks(start: int, stop: int, columns: int, elements: int) -> Iterator[tuple[int, int]]:
    """(first row, row after the last) of blocks of about that many elements, from `start` to `stop`."""
    step = max(1, elements // max(1, columns))
    for first in range(start, stop, step):
        yield first, min(first + step, stop)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a safetensors file, of the base or of an adapter."""

    info: TensorInfo
    folder: Path | None  # None: on the hub, only its header is known yet

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.info.shape

    @property
    def n_elements(self) -> int:
        return prod(self.info.shape)


class Weight(Protocol):
    """A tensor of the base as numbers, however it is stored. It knows headers only, until it is opened."""

    @property
    def name(self) -> str:
        """The tensor it stands for: "model.layers.0.mlp.up_proj.weight", quantized or not."""
        ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str:
        """safetensors' name of what `open` gives: a plain tensor's own dtype; F32 of a quantized one."""
        ...

    @property
    def stored(self) -> tuple[Stored, ...]:
        """Every tensor in files that is read for it."""
        ...

    def open(self, inputs: Inputs) -> ReadRows:
        """Begin to read it. Rows are asked for from first to last, each once or more."""
        ...


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor that is stored as numbers."""

    name: str
    tensor: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        return self.tensor.info.dtype

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.tensor,)

    def open(self, inputs: Inputs) -> ReadRows:
        return lambda start, stop: inputs.rows(self.tensor, start, stop)


class Inputs:
    """The open files of a base and its adapters; read with pread into memory of its own. For one thread.

    Nothing is mapped: mapped pages would count as resident memory.
    """

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._buffers: dict[str, torch.Tensor] = {}
        self._kept: dict[Stored, torch.Tensor] = {}

    def tensor(self, stored: Stored) -> torch.Tensor:
        """A small tensor, whole, in memory of its own and in its own dtype and shape."""
        import torch

        from loader.shards import torch_dtype

        out = torch.empty(stored.shape, dtype=torch_dtype(stored.info.dtype))
        if out.numel():
            self._read(stored, _bytes_of(out), 0)
        return out

    def kept(self, stored: Stored) -> torch.Tensor:
        """As `tensor`, for what several tensors of the output are made from one after the other: the last few
        are kept, and nobody may change them."""
        if stored not in self._kept:
            self._kept[stored] = self.tensor(stored)
            while len(self._kept) > KEPT_TENSORS:
                del self._kept[next(iter(self._kept))]
        return self._kept[stored]

    def rows(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """Rows of a tensor in its own dtype; the next call for the same dtype may overwrite them."""
        from loader.shards import torch_dtype

        columns = matrix(stored.shape)[1]
        dtype = torch_dtype(stored.info.dtype)
        out = self._buffer(stored.info.dtype, dtype, (stop - start) * columns).view(stop - start, columns)
        if out.numel():
            self._read(stored, _bytes_of(out), start * columns * dtype.itemsize)
        return out

    def columns(self, stored: Stored, start: int, stop: int) -> torch.Tensor:
        """Columns of a tensor, [rows, stop - start], in memory of its own: one small read per row."""
        import torch

        from loader.shards import torch_dtype

        rows, columns = matrix(stored.shape)
        dtype = torch_dtype(stored.info.dtype)
        out = torch.empty((rows, stop - start), dtype=dtype)
        view, width = _bytes_of(out), (stop - start) * dtype.itemsize
        file, first = self._open(stored), stored.info.start + start * dtype.itemsize
        for row in range(rows):
            part = view[row * width : (row + 1) * width]
            if os.preadv(file, [part], first + row * columns * dtype.itemsize) != width:
                raise self._truncated(stored)
        return out

    def _read(self, stored: Stored, into: memoryview, offset: int) -> None:
        """Fill `into` from `offset` bytes after the tensor's first. One pread moves at most 2 GiB."""
        file, at = self._open(stored), stored.info.start + offset
        while len(into):
            got = os.preadv(file, [into], at)
            if not got:
                raise self._truncated(stored)
            into, at = into[got:], at + got

    def _open(self, stored: Stored) -> int:
        assert stored.folder is not None, f"{stored.name} is not on this machine"
        path = stored.folder / stored.info.file
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY)
        return self._files[path]

    def _truncated(self, stored: Stored) -> TruncatedShard:
        assert stored.folder is not None
        path = stored.folder / stored.info.file
        return TruncatedShard(str(path), stored.info.end, path.stat().st_size)

    def _buffer(self, name: str, dtype: torch.dtype, numel: int) -> torch.Tensor:
        import torch

        if name not in self._buffers or self._buffers[name].numel() < numel:
            self._buffers[name] = torch.empty(numel, dtype=dtype)
        return self._buffers[name][:numel]

    def close(self) -> None:
        self._kept.clear()
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Inputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
