"""What makes two exports the same: the base, the adapters and the options, as one sha256.

A base is too large to be hashed before every run. Its config, its headers and the first bytes of every tensor
stand for it: another fine-tune of the same shapes, or a file that was fetched anew and differs, shows there.
Adapters are small and are hashed whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loader.checkpoint import ModelSpec

if TYPE_CHECKING:
    from exporter.writer import Written

SAMPLE_BYTES = 4096


def sha256_of(content: Mapping[str, Any]) -> str:
    """Of the JSON of something, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def base_sha256(spec: ModelSpec) -> str:
    """Of a base on this machine: config, generation config, every header, a sample of every tensor."""
    assert spec.path is not None
    digest = hashlib.sha256()
    described = {"config": dict(spec.config), "generation": dict(spec.generation_config)}
    digest.update(json.dumps(described, sort_keys=True).encode())
    opened: dict[str, int] = {}
    try:
        for tensor in sorted(spec.tensors, key=lambda t: t.name):
            if tensor.file not in opened:
                opened[tensor.file] = os.open(spec.path / tensor.file, os.O_RDONLY)
            digest.update(f"{tensor.name} {tensor.dtype} {tensor.shape}\n".encode())
            digest.update(os.pread(opened[tensor.file], min(SAMPLE_BYTES, tensor.n_bytes), tensor.start))
    finally:
        for descriptor in opened.values():
            os.close(descriptor)
    return digest.hexdigest()


def problem(folder: Path, written: Written) -> str:
    """What is amiss with a file by size and sha256, as a sentence; "" when it is as it was written."""
    path = folder / written.file
    if not path.is_file():
        return f"{written.file}: is missing"
    if (size := path.stat().st_size) != written.n_bytes:
        return f"{written.file}: has {size:,} bytes, and {written.n_bytes:,} were written"
    if (sha256 := file_sha256(path)) != written.sha256:
        return f"{written.file}: its sha256 is {sha256[:16]}…, and {written.sha256[:16]}… was written"
    return ""


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
