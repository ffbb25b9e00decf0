"""A replica: a service in a process of its own, started and stopped as Kubernetes does it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 120
_URL = re.compile(r"http://[\d.]+:(\d+)")


class Replica:
    """Runs `python ARGUMENTS`, which prints the URL it answers at. Started by its constructor, usable from
    `wait_until_ready` on; what it says on stderr goes to `log`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SNUGFIT_")}
        self._log = log
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, env=clean
            )
        self._cpu = psutil.Process(self._process.pid)
        self._client = httpx.Client(timeout=START_SECONDS)

    def wait_until_ready(self) -> None:
        """Until /ready says 200, as a readiness probe would."""
        self.port = self._said_port()
        self.url = f"http://127.0.0.1:{self.port}"
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"a replica did not become ready, see {self._log}")
            time.sleep(0.05)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        families = text_string_to_metric_families(self._client.get(f"{self.url}/metrics").text)
        return sum(s.value for family in families for s in family.samples if s.name == name)

    def cpu_seconds(self) -> float:
        times = self._cpu.cpu_times()
        return float(times.user + times.system)

    def terminate(self) -> float:
        """SIGTERM, and the seconds until the process has ended. Raises SystemExit unless it ends with 0."""
        started = time.monotonic()
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(START_SECONDS)
        if code:
            raise SystemExit(f"a replica ended with {code} on SIGTERM, see {self._log}")
        self._shut()
        return time.monotonic() - started

    def kill(self) -> None:
        """Whatever state it is in. Idempotent."""
        self._process.kill()
        self._process.wait()
        self._shut()

    def _shut(self) -> None:
        self._client.close()
        if self._process.stdout:
            self._process.stdout.close()

    def _said_port(self) -> int:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := _URL.search(line):
                return int(found[1])
        raise SystemExit(f"a replica ended with {self._process.wait()} before it listened, see {self._log}")

    def _ready(self) -> bool:
        try:
            return self._client.get(f"{self.url}/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False
