"""GPU memory as the NVIDIA driver tells it, for the devices that CUDA shows to this process.

NVML numbers devices in PCI order and knows nothing of CUDA_VISIBLE_DEVICES, so devices are matched by UUID.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from dataclasses import dataclass
from typing import Any

import pynvml

from loader.probe import visible_handles

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """One GPU at one moment."""

    device: str  # as CUDA counts: "cuda:0"
    uuid: str
    used_bytes: int  # by every process
    total_bytes: int
    process_bytes: int | None  # by this process; None where the driver does not tell


class _Hidden(Exception):
    """The driver lists processes, but not what this one uses."""


class Nvml:
    """A session with the driver's library. Without one it says so once and reads nothing."""

    def __init__(self) -> None:
        self.up = False
        self._lock = threading.Lock()
        self._said: set[str] = set()
        try:
            pynvml.nvmlInit()
            self.up = self._open = True
        except pynvml.NVMLError as err:
            self._open = False
            self._say_once(logging.INFO, f"no NVML ({err}): GPU memory is not measured")

    def read(self) -> list[DeviceMemory]:
        """Every visible device, in CUDA's order. `up` is False afterwards when the driver did not answer."""
        with self._lock:
            if not self._open:
                return []
            try:
                devices = [self._memory(f"cuda:{i}", handle) for i, handle in enumerate(_visible_handles())]
            except pynvml.NVMLError as err:
                self.up = False
                self._say_once(logging.WARNING, f"NVML does not answer: {err}")
                return []
            self.up = True
            return devices

    def close(self) -> None:
        with self._lock:
            if self._open:
                self._open = self.up = False
                pynvml.nvmlShutdown()

    def _memory(self, device: str, handle: Any) -> DeviceMemory:
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        uuid = pynvml.nvmlDeviceGetUUID(handle)
        return DeviceMemory(device, uuid, memory.used, memory.total, self._own_bytes(device, handle))

    def _own_bytes(self, device: str, handle: Any) -> int | None:
        try:
            return _process_bytes(handle)
        except (_Hidden, pynvml.NVMLError) as err:
            self._say_once(logging.INFO, f"{device}: the driver does not tell what this process uses ({err})")
            return None

    def _say_once(self, level: int, words: str) -> None:
        if words not in self._said:
            self._said.add(words)
            log.log(level, "%s", words)


def _process_bytes(handle: Any) -> int:
    """What this process uses of one device, found by its process id."""
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    own = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
    if None in own:
        raise _Hidden("the figure is not available")
    if not own and (processes or _cuda_runs()):
        raise _Hidden("it lists other process ids, as is usual in a container")
    return int(sum(own))


def _visible_handles() -> list[Any]:
    """NVML's handles in CUDA's order: as CUDA itself counts once it runs, until then as its variables say."""
    if _cuda_runs():
        torch = sys.modules["torch"]
        properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        return [_by_uuid(str(device.uuid)) for device in properties]
    return visible_handles(os.environ.get("CUDA_VISIBLE_DEVICES"))


def _cuda_runs() -> bool:
    """Whether this process uses CUDA. torch is never imported for a scrape."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def _by_uuid(uuid: str) -> Any:
    """torch leaves the prefix away."""
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
