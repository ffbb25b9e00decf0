"""Services in processes of their own, found by the URL that they print."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import httpx

DEADLINE_SECONDS = 120
ROOT = Path(__file__).resolve().parents[2]
_URL = re.compile(r"http://127\.0\.0\.1:\d+")
OTHERS = ("SNUGFIT_", "CUDA_", "FAKE_NVML")  # settings that would not be ours


class Service:
    """`python -m …`, started by `with`; it logs to a file in `folder`."""

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        self.name, self._command = name, [sys.executable, "-m", *command]
        self._log = folder / f"{name}.log"
        clean = {key: value for key, value in os.environ.items() if not key.startswith(OTHERS)}
        self._environment = {**clean, **environment}

    def __enter__(self) -> Service:
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=self._environment
            )
        try:
            self.url = self._address()
        except BaseException:
            self._stop()
            raise
        self.http = httpx.Client(base_url=self.url, timeout=DEADLINE_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()
        self._stop()

    @property
    def address(self) -> str:
        """host:port"""
        return self.url.removeprefix("http://")

    def metrics(self) -> str:
        return self.http.get("/metrics").text

    def tell(self, deed: str) -> None:
        """Of `deployment.monitoring.scripted.Script`."""
        self.http.post(f"/script/{deed}").raise_for_status()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.http.get("/ready").status_code != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{self.name} did not become ready; its log is {self._log}")
            time.sleep(0.1)

    def _address(self) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := _URL.search(line):
                return found[0]
        raise SystemExit(f"{self.name} ended with exit code {self.process.wait()}; its log is {self._log}")

    def _stop(self) -> None:
        self.process.kill()
        self.process.communicate()
