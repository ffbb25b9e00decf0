"""One flat buffer per device, allocated once; every resident weight is a view of it."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Vector loads and tensor cores want aligned rows; 256 is what CUDA's allocators give.
ALIGN_BYTES = 256
# Weights are read whole at every step: with pages of 4 KiB the processor spends part of that on finding them.
# Reading 0.9 GB was 5 to 20 % faster with huge ones, touching them the first time took 0.9 s a GB longer.
HUGE_PAGE_BYTES = 2 * 2**20
MADV_HUGEPAGE = 14


class Arena:
    """Hands out views of one buffer: loading cannot fragment memory, and its total is known before."""

    def __init__(self, capacity_bytes: int, device: torch.device, huge_pages: bool = True) -> None:
        """`huge_pages`: for what every step reads they are worth their time at the start."""
        import torch

        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
        large = huge_pages and capacity_bytes >= 2 * HUGE_PAGE_BYTES
        if large and device.type == "cpu" and sys.platform == "linux":
            self._buffer = _huge_buffer(capacity_bytes)
        else:
            self._buffer = torch.empty(capacity_bytes, dtype=torch.uint8, device=device)

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """A tensor of that shape; MemoryError when the arena was planned too small."""
        n_bytes = shape.numel() * dtype.itemsize
        start = aligned(self.used_bytes)
        if start + n_bytes > self.capacity_bytes:
            raise MemoryError(
                f"arena of {self.capacity_bytes:,} bytes: {n_bytes:,} more do not fit at {start:,}"
            )
        self.used_bytes = start + n_bytes
        return self._buffer[start : start + n_bytes].view(dtype).view(shape)


def _huge_buffer(n_bytes: int) -> torch.Tensor:
    """Begins at a huge page. Nothing is written before that, nor are there huge pages beyond the end, so it
    takes no more memory than without; where the system has none to give, it is memory as any other."""
    import torch

    whole = torch.empty(n_bytes + HUGE_PAGE_BYTES, dtype=torch.uint8)
    start = -whole.data_ptr() % HUGE_PAGE_BYTES
    buffer = whole[start : start + n_bytes]
    inside = n_bytes // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
    with suppress(OSError, AttributeError):  # a C library without madvise
        madvise = ctypes.CDLL(None).madvise
        madvise(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_size_t(inside), MADV_HUGEPAGE)
    return buffer


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES
