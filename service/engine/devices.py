"""Which device it is, and whether it still computes."""

from __future__ import annotations

import torch

from service.engine.types import DeviceLost

_CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that there was no memory, of a GPU or of the machine: then less may do.

    torch (2.13) raises OutOfMemoryError for GPUs alone. Its allocator for the CPU fails with a plain
    RuntimeError, which only its text tells from any other.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_ALLOCATOR in str(error)


def check_device(device: torch.device) -> None:
    """Raises DeviceLost when it cannot even add, as a GPU whose context is broken; then no later step can
    succeed either."""
    try:
        float(torch.ones(1, device=device) + 1)
    except Exception as error:
        raise DeviceLost(f"{device} answers nothing any more: {error}") from error


def numbered(device: torch.device) -> torch.device:
    """With its number, as tensors name theirs: "cuda" is the current GPU."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
