"""Measures what a model adds to each computing device; caps the GPUs and bounds malloc before it is there."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress

from loader import probe
from loader.batching import CONTINUOUS
from loader.errors import CudaTakesMore
from loader.placement import CUDA_GRAPHS_BYTES
from loader.plan import Plan
from loader.probe import Machine

# M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of mallopt(3), as glibc starts with them. Left alone they grow with
# every large block that is freed, up to 32 and 64 MiB, and freed blocks below that stay with the process.
MALLOC_OPTIONS = {-3: 128 * 2**10, -1: 128 * 2**10}
# CUDA loads a kernel when it is first used, with room for what its threads keep, beside torch's allocator: on
# an H100, 76 MB more after a first step with FlashAttention.
LATER_KERNELS_BYTES = 80_000_000
# A weight that is copied in for a moment leaves a large free block. Were small tensors cut out of it, which
# stay, the next weight would need a block beside it: a 7B with all its weights offloaded took 1 GB more.
DO_NOT_SPLIT = "max_split_size_mb:32"


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
        self._configured = bool(gpus and plan.offloaded_bytes) and not _users_own_settings()
        if self._configured:
            _configure_allocator(DO_NOT_SPLIT)
        before = None if _cuda_runs() else probe.machine()
        self._free_before = {gpu: _free_before(gpu, before) for gpu in gpus}
        planned_bytes = max(plan.budget.context_bytes - LATER_KERNELS_BYTES, 0)
        self._context_bytes = {
            gpu: _context_bytes(gpu, self._free_before[gpu], planned_bytes) for gpu in gpus
        }
        self._later_bytes = {gpu: _later_bytes(gpu, plan) for gpu in gpus}
        for gpu, context_bytes in self._context_bytes.items():
            _cap(gpu, plan.budget.limits[gpu] - context_bytes - self._later_bytes[gpu])
        gc.collect()
        # Where the peak cannot be started again, what is above the one so far is all that can be told.
        started = probe.reset_peak()
        self.baseline_bytes = probe.resident_bytes() if started else probe.peak_resident_bytes()

    def refuse_what_cannot_fit(self, plan: Plan) -> None:
        """Raises CudaTakesMore where CUDA itself has taken what the model needs: before weights are read."""
        for device in plan.devices:
            if device.device not in self._context_bytes:
                continue
            context_bytes, later_bytes = self._context_bytes[device.device], self._later_bytes[device.device]
            need_bytes = device.peak_bytes - device.reserve_bytes + context_bytes + later_bytes
            if need_bytes > device.budget_bytes:
                raise CudaTakesMore(device.device, context_bytes, need_bytes, device.budget_bytes)

    def recount(self) -> None:
        """What CUDA has taken since, beside torch's allocator, counts from now on: kernels and graphs.

        No more of it than was spared for that: the rest is what others have taken of the card meanwhile.
        """
        for gpu, was_free in self._free_before.items():
            if was_free is not None:
                taken = _beside_the_allocator(gpu, was_free) - self._context_bytes[gpu]
                counted = min(max(taken, 0), self._later_bytes[gpu])
                self._context_bytes[gpu] += counted
                self._later_bytes[gpu] -= counted

    def close(self) -> None:
        """Give back what torch's allocator keeps of each GPU, and take the caps off."""
        import torch

        torch.cuda.empty_cache()
        for gpu in self._context_bytes:
            torch.cuda.set_per_process_memory_fraction(1.0, gpu)
        if self._configured:
            _configure_allocator("")

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


def _users_own_settings() -> bool:
    return any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))


def _configure_allocator(settings: str) -> None:
    """In the form of PYTORCH_ALLOC_CONF, which torch reads too early for us; "" is its defaults."""
    import torch

    torch._C._accelerator_setAllocatorSettings(settings)


def _cuda_runs() -> bool:
    """Whether there is a context already; torch need not even be there."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _later_bytes(device: str, plan: Plan) -> int:
    """What the driver takes of a GPU after the first product: kernels, and graphs where there may be any."""
    graphs = device == plan.main_device and plan.batching == CONTINUOUS and not plan.offloaded_bytes
    return LATER_KERNELS_BYTES + (CUDA_GRAPHS_BYTES if graphs else 0)


def _free_before(device: str, before: Machine | None) -> int | None:
    """Of a GPU, free bytes before any context was created; `before` is None when there was one already."""
    import torch

    uuid = str(torch.cuda.get_device_properties(device).uuid)  # NVML may number the cards otherwise
    gpus = before.gpus if before else ()
    return next((gpu.free_bytes for gpu in gpus if gpu.uuid.endswith(uuid)), None)


def _context_bytes(device: str, was_free: int | None, planned_bytes: int) -> int:
    """Create the CUDA context and return what it takes, torch's allocator aside. Where nothing is known of
    the moment before, it counts as much as was planned for it."""
    import torch

    warm = torch.ones(64, 64, dtype=torch.bfloat16, device=device)
    (warm @ warm).sum().item()  # kernels and cuBLAS are loaded when they are first used
    torch.cuda.reset_peak_memory_stats(device)
    return planned_bytes if was_free is None else _beside_the_allocator(device, was_free)


def _beside_the_allocator(device: str, was_free: int) -> int:
    import torch

    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(was_free - free_bytes - torch.cuda.memory_reserved(device), 0)


def _cap(device: str, allowed_bytes: int) -> None:
    """Let torch's allocator take no more than that of the GPU."""
    import torch

    _, total_bytes = torch.cuda.mem_get_info(device)
    share = allowed_bytes / total_bytes
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, share)), device)
