"""What this machine has and what this process takes of it. Only it asks, through cgroup.py too. No torch."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

from loader import cgroup

# FP32 cores of a multiprocessor are 128, but for these compute capabilities.
CORES, FEW_CORES, FEW = 128, 64, {(6, 0), (7, 0), (7, 2), (7, 5), (8, 0)}
PROC_CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")
PROC_STATUS = Path("/proc/self/status")
PROC_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that CUDA shows to this process, at one moment."""

    device: str  # as CUDA counts: "cuda:0"
    name: str
    uuid: str  # as NVML writes it: "GPU-…"
    total_bytes: int
    free_bytes: int
    multiprocessors: int | None = None  # None where the driver does not tell


@dataclass(frozen=True, slots=True)
class Machine:
    """Memory of every device. A plain value, so that one can plan for a machine that is not this one."""

    ram_total_bytes: int
    ram_free_bytes: int  # what a program may take without swapping, within the container's limit
    gpus: tuple[Gpu, ...] = ()  # in CUDA's order

    def free_bytes(self, device: str) -> int | None:
        """Free bytes of "cpu" or "cuda:N"; None for a device that is not there."""
        if device == "cpu":
            return self.ram_free_bytes
        return next((gpu.free_bytes for gpu in self.gpus if gpu.device == device), None)


def machine() -> Machine:
    """This machine, now. Without NVIDIA's driver it has no GPUs."""
    total, free = _ram()
    return Machine(total, free, _gpus())


# GPUs


def _gpus() -> tuple[Gpu, ...]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, numbered as CUDA will number them.

    NVML counts in PCI order. CUDA does so with CUDA_DEVICE_ORDER=PCI_BUS_ID; by default it puts the fastest
    card first, which differs only where cards of different kinds are mixed.
    """
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        visible = visible_handles(os.environ.get("CUDA_VISIBLE_DEVICES"))
        return tuple(_gpu(f"cuda:{number}", handle) for number, handle in enumerate(visible))
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()


def _gpu(device: str, handle: Any) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    name, uuid = pynvml.nvmlDeviceGetName(handle), pynvml.nvmlDeviceGetUUID(handle)
    return Gpu(device, name, uuid, int(memory.total), int(memory.free), _multiprocessors(handle))


def _multiprocessors(handle: Any) -> int | None:
    """NVML counts cores; an old driver, or for an instance of a card that is cut up, not even those."""
    try:
        cores = pynvml.nvmlDeviceGetNumGpuCores(handle)
        capability = tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle))
    except pynvml.NVMLError:
        return None
    return int(cores) // (FEW_CORES if capability in FEW else CORES)


def visible_handles(choice: str | None) -> list[Any]:
    """NVML's handles for a CUDA_VISIBLE_DEVICES of indices or UUIDs, which may be cut short. None: all.

    As in CUDA, the first entry that names no device ends the list, so "" and "-1" hide all. NVML must be
    initialized; raises NVMLError.
    """
    every = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    if choice is None:
        return every
    chosen: list[Any] = []
    for entry in choice.split(","):
        handle = _named(entry.strip(), every)
        if handle is None:
            break
        chosen.append(handle)
    return chosen


def _named(entry: str, every: list[Any]) -> Any | None:
    if entry.startswith("MIG-"):
        return pynvml.nvmlDeviceGetHandleByUUID(entry)
    if entry.isdecimal():
        return every[int(entry)] if int(entry) < len(every) else None
    matching = [h for h in every if entry and pynvml.nvmlDeviceGetUUID(h).startswith(entry)]
    return matching[0] if len(matching) == 1 else None


# RAM


def _ram() -> tuple[int, int]:
    """(total, free) bytes: the machine's, or less where a control group limits this process."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    for limit, used in cgroup.memory_limits(PROC_CGROUP, CGROUP_ROOT):
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


# Processors


def cpu_threads() -> int:
    """Threads that computing is worth: one for each core that this process may use and is given time on.

    No more than the machine has cores, whose hardware threads share what it computes with. A quota of 1.5
    cores is 2 threads.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = min(allowed, psutil.cpu_count(logical=False) or allowed)
    shares = cgroup.cpu_limits(PROC_CGROUP, CGROUP_ROOT)
    return max(1, min([cores, *(math.ceil(share) for share in shares)]))


# This process


def resident_bytes() -> int:
    """What this process holds in RAM, pages of mapped files included (on Windows: its working set)."""
    return int(psutil.Process().memory_info().rss)


def reset_peak() -> bool:
    """Start `peak_resident_bytes` again from now. False where the system cannot: anywhere but on Linux."""
    try:
        # man 5 proc: 5 resets "the peak resident set size to the process's current" one.
        PROC_CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int:
    """The most that this process held in RAM since `reset_peak`, or since it started where that is False."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    try:
        lines = PROC_STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return _peak_of_rusage()


def _peak_of_rusage() -> int:
    if sys.platform == "win32":
        return resident_bytes()
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)
