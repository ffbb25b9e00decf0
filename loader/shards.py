"""Reads tensors out of safetensors files straight into memory that is already there.

Nothing is mapped: mapped pages count as resident memory, leave it when the kernel wishes, and come back as
page faults in the middle of a forward. The format is in loader/headers.py.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loader.checkpoint import TensorInfo
from loader.errors import TruncatedShard

if TYPE_CHECKING:
    import torch

# What a read that cannot go straight to its place (another dtype, a GPU) takes at a time.
STAGING_BYTES = 8 * 2**20


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of safetensors' dtype name; KeyError for one that is no float or integer of torch."""
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    }[name]  # fmt: skip


class ShardReader:
    """The open shards of one checkpoint. One thread uses it at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, io.FileIO] = {}

    def read_into(self, out: torch.Tensor, info: TensorInfo) -> None:
        """Fill `out` (any device, any float dtype, as many elements as `info`) with the tensor's values."""
        if out.numel() == 0:
            return
        if out.device.type == "cpu" and out.is_contiguous() and out.dtype == torch_dtype(info.dtype):
            self._read(_bytes_of(out), info.file, info.start)
        else:
            self._read_staged(out, info)

    def same(self, one: TensorInfo, other: TensorInfo) -> bool:
        """Whether two tensors have the same dtype, shape and bytes; read in pieces."""
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        first, second = bytearray(STAGING_BYTES), bytearray(STAGING_BYTES)
        for at in range(0, one.n_bytes, STAGING_BYTES):
            n_bytes = min(STAGING_BYTES, one.n_bytes - at)
            self._read(memoryview(first)[:n_bytes], one.file, one.start + at)
            self._read(memoryview(second)[:n_bytes], other.file, other.start + at)
            if first != second:
                return False
        return True

    def _read_staged(self, out: torch.Tensor, info: TensorInfo) -> None:
        import torch

        dtype = torch_dtype(info.dtype)
        rows = out.view(-1) if out.is_contiguous() else out
        if not out.is_contiguous():
            # A slice of a fused tensor: rows are contiguous even where the whole is not.
            whole = torch.empty(out.shape, dtype=dtype)
            self._read(_bytes_of(whole), info.file, info.start)
            out.copy_(whole)
            return
        step = max(1, min(rows.numel(), STAGING_BYTES // dtype.itemsize))
        staging = torch.empty(step, dtype=dtype)
        for first in range(0, rows.numel(), step):
            part = staging[: min(step, rows.numel() - first)]
            self._read(_bytes_of(part), info.file, info.start + first * dtype.itemsize)
            rows[first : first + part.numel()].copy_(part)

    def _read(self, into: memoryview, name: str, start: int) -> None:
        file = self._open(name)
        file.seek(start)
        done = 0
        while done < len(into):
            # One read call moves at most 2 GiB on Linux, so a big embedding takes several.
            n = file.readinto(into[done:])
            if not n:
                raise TruncatedShard(str(self._folder / name), start + len(into), file.seek(0, io.SEEK_END))
            done += n

    def _open(self, name: str) -> io.FileIO:
        if name not in self._files:
            self._files[name] = io.FileIO(str(self._folder / name), "rb")
        return self._files[name]

    def close(self) -> None:
        while self._files:
            self._files.popitem()[1].close()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    import torch

    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
