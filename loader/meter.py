"""Measures what a model adds to each computing device; caps the GPUs and bounds malloc before it is there."""

from __future__ import annotations

import ctypes
import gc
import sys
from contextlib import suppress

from loader import probe
from loader.placement import CUDA_CONTEXT_BYTES
from loader.plan import Plan
from loader.probe import Machine

# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3), as glibc starts with them. Left alone they grow with
# every large block that is freed, up to 32 and 64 MiB, and freed blocks below that stay with the process.
MALLOC_OPTIONS = {-3: 128 * 2**10, -1: 128 * 2**10}


def give_back_what_is_freed() -> None:
    """From now on, blocks of 128 KiB and more go back to the system as soon as they are freed.

    Call it before a model is built, which frees a block for every parameter: otherwise a model of 100 MB, two
    fifths of it offloaded, takes 33 MB more than it needs. Without glibc it does nothing.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    with suppress(AttributeError):
        for option, value in MALLOC_OPTIONS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)


class Meter:
    """Start it when everything but the model is in memory; it counts from there."""

    def __init__(self, plan: Plan) -> None:
        self._devices = [device.device for device in plan.devices if device.device != "disk"]
        gpus = [device for device in self._devices if device != "cpu"]
        before = probe.machine()
        self._context_bytes = {gpu: _cap(gpu, plan.budget.limits[gpu], before) for gpu in gpus}
        gc.collect()
        # Where the peak cannot be started again, what is above the one so far is all that can be told.
        started = probe.reset_peak()
        self.baseline_bytes = probe.resident_bytes() if started else probe.peak_resident_bytes()

    def peak_bytes(self) -> dict[str, int]:
        """The most so far, by device of the plan but the disk.

        RAM: resident memory above the start; beside a GPU also what CUDA's libraries take on the host. A GPU:
        context and allocator.
        """
        return {device: self._peak(device) for device in self._devices}

    def _peak(self, device: str) -> int:
        if device == "cpu":
            return max(0, probe.peak_resident_bytes() - self.baseline_bytes)
        import torch

        return self._context_bytes[device] + torch.cuda.max_memory_reserved(device)


def _cap(device: str, budget_bytes: int, before: Machine) -> int:
    """Create the CUDA context, cap the allocator at the budget less the context, and return its bytes.

    `before` is the machine before any context was created. Without NVML nothing is known of that moment, and
    the context counts as much as the plan has put aside for it.
    """
    import torch

    warm = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    (warm @ warm).sum().item()  # kernels and cuBLAS are loaded when they are first used
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    uuid = str(torch.cuda.get_device_properties(device).uuid)  # NVML may number the cards otherwise
    was_free = next((gpu.free_bytes for gpu in before.gpus if gpu.uuid.endswith(uuid)), None)
    reserved_bytes = torch.cuda.memory_reserved(device)
    measured = was_free - free_bytes - reserved_bytes if was_free is not None else CUDA_CONTEXT_BYTES
    context_bytes = max(measured, 0)
    fraction = (budget_bytes - context_bytes) / total_bytes
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, fraction)), device)
    return context_bytes
