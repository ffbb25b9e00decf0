"""A `snugfit serve` of one's own in a process of its own, watched from outside."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from service.openai_client import ChatApi

START_SECONDS = 900
SAMPLE_SECONDS = 0.01
_URL = re.compile(r"(\S+) will answer at (http://\S+)/v1")


class Server:
    """Started by `with`, ready when the block begins, stopped at its end."""

    def __init__(self, model: Path, *flags: str) -> None:
        self._command = [sys.executable, "-m", "service", "serve", str(model), "--port", "0", *flags]

    def __enter__(self) -> Server:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SNUGFIT_")}
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True, env=clean)
        self.name, self.url = self._address()
        self.resident = ResidentPeak(self._process.pid)
        self.client = httpx.Client(base_url=self.url, timeout=START_SECONDS)
        self._wait_until_ready()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.resident.stop()
        self.client.close()
        self._process.terminate()
        self._process.communicate()

    def chat(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        """One greedy answer, as the response's JSON."""
        response = self.client.post("/v1/chat/completions", json=self.body(prompt, max_tokens))
        response.raise_for_status()
        return dict(response.json())

    def body(self, prompt: str, max_tokens: int) -> dict[str, Any]:
        messages = [{"role": "user", "content": prompt}]
        return {"model": self.name, "messages": messages, "max_tokens": max_tokens, "temperature": 0}

    def metric(self, name: str) -> int:
        """The only sample of a gauge that has no other device than the CPU."""
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        (value,) = (
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == name and sample.labels.get("device") in (None, "cpu")
        )
        return int(value)

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
                    self._process.kill()
                    raise SystemExit("the server did not become ready")
                time.sleep(0.05)


class ResidentPeak:
    """The most resident memory of a process, sampled from outside: it does not believe the server's own."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stopped = threading.Event()
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            try:
                self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)
            except psutil.Error:
                return
