"""The safetensors header: which tensors a file holds, and where. No tensor is read.

Format: 8 bytes of length (little-endian), that many bytes of JSON, then the data of all tensors without a gap
(safetensors' own documentation, "Format"). Dtypes are those of safetensors 0.8.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, TypeGuard

from loader.errors import BadHeader, LfsPointer, TruncatedShard

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # what safetensors itself accepts
LFS_MARK = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024  # a Git-LFS pointer is shorter

DTYPE_BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16,
    "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

# What people really have where a safetensors file should be.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes",
    b"\x80\x02": "a pickle",
    b"GGUF": "a GGUF file",
    b"<!DO": "an HTML page, perhaps of a login",
    b"<htm": "an HTML page, perhaps of a login",
    b"{": "JSON without a length before it",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor as its safetensors header describes it."""

    name: str
    dtype: str  # the format's own names: "BF16", "F32"
    shape: tuple[int, ...]
    file: str  # name of the shard, relative to the model's folder
    start: int  # first byte of the data, from the start of the file
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.start


def header_length(first: bytes, file_bytes: int, where: str) -> int:
    """The length of the JSON from a file's first bytes (8 or more where the file has them).

    Raises LfsPointer or BadHeader for what is not the beginning of a safetensors file of `file_bytes`.
    """
    refuse_lfs_pointer(first, where)
    if file_bytes < LENGTH_BYTES or len(first) < LENGTH_BYTES:
        raise BadHeader(where, f"it has {file_bytes:,} bytes")
    for magic, what in _OTHER_FORMATS.items():
        # A real header's first bytes are a length: "{" there would be a length of 2^32 or more.
        if first.startswith(magic) and any(first[4:LENGTH_BYTES]):
            raise BadHeader(where, f"it is {what}")
    length = int.from_bytes(first[:LENGTH_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise BadHeader(where, f"a header of {length:,} bytes, more than {MAX_HEADER_BYTES:,}")
    if LENGTH_BYTES + length > file_bytes:
        raise BadHeader(where, f"a header of {length:,} bytes in a file of {file_bytes:,}")
    return length


def parse_header(text: bytes, file: str, file_bytes: int, where: str) -> list[TensorInfo]:
    """The tensors of a file in the order of their data; `text` is the JSON, `where` names the file in errors.

    Raises BadHeader, or TruncatedShard when the file is not as long as its tensors together.
    """
    data_start = LENGTH_BYTES + len(text)
    entries = sorted(_entries(text, where), key=lambda entry: entry[3:])
    tensors, end = [], 0
    for name, dtype, shape, start, stop in entries:
        if start != end:
            raise BadHeader(where, f"{name}: data at {start:,}, while the tensors before it end at {end:,}")
        tensors.append(TensorInfo(name, dtype, shape, file, data_start + start, data_start + stop))
        end = stop
    if data_start + end != file_bytes:
        raise TruncatedShard(where, data_start + end, file_bytes)
    return tensors


def refuse_lfs_pointer(first: bytes, where: str) -> None:
    """Raise LfsPointer when a file begins as a Git-LFS pointer does.

    Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
    """
    if not first.startswith(LFS_MARK):
        return
    lines = (line.split(b" ", 1) for line in first.splitlines())
    size = next((words[1] for words in lines if words[0] == b"size" and len(words) == 2), b"")
    raise LfsPointer(where, int(size) if size.isdigit() else 0)


Entry = tuple[str, str, tuple[int, ...], int, int]


def _entries(text: bytes, where: str) -> Iterator[Entry]:
    """(name, dtype, shape, start, end) of every tensor, in the order of the JSON."""
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise BadHeader(where, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise BadHeader(where, "its header is not a JSON object")
    header.pop("__metadata__", None)
    for name, value in header.items():
        yield _entry(name, value, where)


def _entry(name: str, value: Any, where: str) -> Entry:
    if not isinstance(value, dict):
        raise BadHeader(where, f"{name}: no dtype, shape and data_offsets")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise BadHeader(where, f"{name}: dtype {dtype!r} is not one of safetensors 0.8")
    if not (_are_sizes(shape) and _are_sizes(offsets)) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise BadHeader(where, f"{name}: shape {shape!r} at {offsets!r}")
    start, end = offsets
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - start):
        raise BadHeader(
            where, f"{name}: {dtype} {shape} takes {bits / 8:,.10g} bytes and has {end - start:,}"
        )
    return name, dtype, tuple(shape), start, end


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)
