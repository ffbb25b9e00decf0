"""A `snugfit serve` of one's own in a process of its own, watched from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import httpx
import psutil
import pynvml
from prometheus_client.parser import text_string_to_metric_families

from loader.probe import visible_handles
from service.openai_client import ChatApi
from service.planning import model_source
from service.settings import Settings

BUILT_IN = Path(model_source(Settings()))
START_SECONDS = 900
SAMPLE_SECONDS = 0.01
_URL = re.compile(r"(\S+) will answer at (http://\S+)/v1")
Result = TypeVar("Result")


class Server:
    """Started by `with`, ready when the block begins, stopped at its end. `device` is "cpu" or "cuda:N"."""

    def __init__(self, model: Path, device: str, *flags: str) -> None:
        self.device = device
        given = ["--device", device, "--port", "0", *flags]
        self._command = [sys.executable, "-m", "service", "serve", str(model), *given]

    def __enter__(self) -> Server:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SNUGFIT_")}
        watched: Watched = Gpu(self.device) if self.device.startswith("cuda") else Resident()
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=clean)
        self.outside = Peak(watched, self._process.pid)
        try:
            self.name, self.url = self._address()
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        self.client = httpx.Client(base_url=self.url, timeout=START_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.client.close()
        self._stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def chat(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """One greedy answer, as the response's JSON."""
        response = self.client.post("/v1/chat/completions", json=self.body(prompt, max_tokens))
        response.raise_for_status()
        return dict(response.json())

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.name, "messages": messages, "max_tokens": max_tokens, "temperature": 0}

    def metric(self, name: str) -> int:
        """A gauge's sample for the device that computes, or its only one."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        (value,) = (
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and sample.labels.get("device") in (None, self.device)
        )
        return int(value)

    def _stop(self) -> None:
        self.outside.stop()
        self._process.terminate()
        self._process.communicate()

    def _address(self) -> tuple[str, str]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := _URL.search(line):
                return found[1], found[2]
        raise SystemExit(f"the server ended with exit code {self._process.wait()}")

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        with ChatApi(self.url) as api:
            while not api.readiness()[0]:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("the server did not become ready")
                time.sleep(0.05)


class Watched(Protocol):
    """What a process holds, seen from outside, by name, in bytes."""

    def read(self, pid: int) -> dict[str, int]: ...


class Resident:
    """RAM, pages of mapped files included."""

    def read(self, pid: int) -> dict[str, int]:
        try:
            return {"resident": int(psutil.Process(pid).memory_info().rss)}
        except psutil.Error:
            return {}


class Gpu:
    """What the card holds above now, and what the driver counts for the process where it tells that.

    Only the first counts everything, and only on a card that nobody else uses is it the process alone.
    """

    def __init__(self, device: str) -> None:
        pynvml.nvmlInit()
        visible = visible_handles(os.environ.get("CUDA_VISIBLE_DEVICES"))
        self._handle = visible[int(device.partition(":")[2] or 0)]
        self._before = self._used()

    def read(self, pid: int) -> dict[str, int]:
        found = {"card": self._used() - self._before}
        for process in pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle):
            if process.pid == pid and process.usedGpuMemory is not None:
                found["process"] = int(process.usedGpuMemory)
        return found

    def _used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)


class Peak:
    """The most of each figure so far, sampled all the time: it does not believe the process's own."""

    def __init__(self, watched: Watched, pid: int) -> None:
        self._watched, self._pid = watched, pid
        self._stopped = threading.Event()
        self.peak_bytes: dict[str, int] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            for name, n_bytes in self._watched.read(self._pid).items():
                self.peak_bytes[name] = max(self.peak_bytes.get(name, 0), n_bytes)


def elsewhere(work: Callable[..., Result], *arguments: Any) -> Result:
    """The result of `work` in a process of its own: what it takes of RAM or a GPU is gone afterwards."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(work, arguments)
