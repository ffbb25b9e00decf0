"""MemoryBudget, and the only place where a size is text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that snugfit may use, device by device.

    `compute` are the devices that run the model, in pipeline order: ("cuda:0",), ("cuda:0", "cuda:1") or ("cpu",).
    `limits` maps each of them, and where weights may be offloaded ("cpu", "disk"), to bytes. On a GPU the limit
    covers the CUDA context too; on "cpu" as a compute device it is the resident memory that the model adds.
    """

    compute: tuple[str, ...]
    limits: dict[str, int]
