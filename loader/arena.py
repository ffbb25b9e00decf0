"""One flat buffer per device, allocated once; every resident weight is a view of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Vector loads and tensor cores want aligned rows; 256 is what CUDA's allocators give.
ALIGN_BYTES = 256


class Arena:
    """Hands out views of one buffer: loading cannot fragment memory, and its total is known before."""

    def __init__(self, capacity_bytes: int, device: torch.device) -> None:
        import torch

        self.capacity_bytes = capacity_bytes
        self.used_bytes = 0
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


def aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGN_BYTES) * ALIGN_BYTES
