"""What a machine can do at best, measured now, and what a model asks of it: what shares are taken of."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loader import checkpoint
from loader.footprint import measure

READ_BYTES = 1 << 30
GEMM_SIZES = {"cpu": 2048, "cuda": 8192}  # a GPU is not busy with less
TRIAL_SIZE = 512  # enough to tell on a CPU which dtype is the faster
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """What this machine can do at best, now."""

    read_bytes_per_second: float
    operations_per_second: float  # of matrix multiplication
    dtype: str  # in which it is faster: a CPU without bf16 products multiplies in float32
    device: str  # its name, or how many threads the CPU has for us

    def row(self) -> dict[str, Any]:
        return {
            "read_gb_per_second": round(self.read_bytes_per_second / 1e9, 1),
            "gflop_per_second": round(self.operations_per_second / 1e9),
            "gemm_dtype": self.dtype,
            "device": self.device,
        }

    def __str__(self) -> str:
        return (
            f"{self.device}: reads {self.read_bytes_per_second / 1e9:.1f} GB/s, "
            f"multiplies {self.operations_per_second / 1e9:.0f} GFLOP/s in {self.dtype}"
        )


def limits(device: str) -> Limits:
    """The best of a few runs each: a sum over 1 GiB, and a square product of random numbers."""
    block = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    read = READ_BYTES / min(_seconds(block.sum, device) for _ in range(REPEATS))
    on_cpu = device == "cpu"
    dtypes = (torch.bfloat16, torch.float32) if on_cpu else (torch.bfloat16,)
    dtype = max(dtypes, key=lambda each: _products(TRIAL_SIZE, each, device))
    operations = _products(GEMM_SIZES[torch.device(device).type], dtype, device)
    name = f"{torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(device)
    return Limits(read, operations, str(dtype).removeprefix("torch."), name)


def _products(size: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second."""
    left = torch.randn(size, size, dtype=dtype, device=device)
    return 2 * size**3 / min(_seconds(lambda: left @ left, device) for _ in range(REPEATS))


def _seconds(work: Any, device: str) -> float:
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Work:
    """What a dense model with full attention must at least read and multiply."""

    layer_bytes: int
    head_bytes: int
    dtype_bytes: int
    hidden: int  # of attention: heads x head size
    layers: int

    @classmethod
    def of(cls, model: Path) -> Work:
        footprint = measure(checkpoint.read(model))
        shape = footprint.shape
        return cls(
            layer_bytes=sum(unit.n_bytes for unit in footprint.units if unit.layer is not None),
            head_bytes=footprint.vocab_size * shape.hidden * footprint.dtype_bytes,
            dtype_bytes=footprint.dtype_bytes,
            hidden=shape.heads * shape.head_dim,
            layers=len(shape.layer_kinds),
        )

    @property
    def read_bytes(self) -> int:
        """Of a step, however many tokens it has; the KV cache is left out."""
        return self.layer_bytes + self.head_bytes

    def step_seconds(self, best: Limits, rows: int = 1) -> float:
        """One decode step: every matrix is read once, and multiplied by each row."""
        return self._at_best(best, 2 * rows * self.read_bytes / self.dtype_bytes)

    def prefill_seconds(self, best: Limits, tokens: int, requests: int = 1) -> float:
        """2 operations for each parameter of the layers and token, causal attention, a row of the head."""
        one = 2 * tokens * self.layer_bytes / self.dtype_bytes
        one += 2 * tokens**2 * self.hidden * self.layers
        one += 2 * self.head_bytes / self.dtype_bytes
        return self._at_best(best, requests * one)

    def batch_seconds(self, best: Limits, requests: int, prompt: int, answer: int) -> float:
        """So many requests at once: their prompts, then the steps that all of them take together."""
        steps = (answer - 1) * self.step_seconds(best, requests)
        return self.prefill_seconds(best, prompt, requests) + steps

    def _at_best(self, best: Limits, operations: float) -> float:
        """Reading and multiplying overlap: what takes longer counts."""
        return max(self.read_bytes / best.read_bytes_per_second, operations / best.operations_per_second)
