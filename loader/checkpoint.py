"""A checkpoint's config and tensor headers, read without reading a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


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


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint holds: config.json, generation_config.json and every tensor's header."""

    source: str  # what the user typed: a folder or a hub id
    path: Path | None  # the local folder; None when only headers were read from the hub
    config: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    generation_config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def file_bytes(self) -> int:
        """Bytes of tensor data in all shards."""
        return sum(t.n_bytes for t in self.tensors)
