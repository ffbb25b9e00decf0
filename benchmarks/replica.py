"""A replica: a service in a process of its own, started and stopped as Kubernetes does it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

START_SECONDS = 120
_URL = re.compile(r"http://[\d.]+:(\d+)")


class Replica:
    """Runs `python ARGUMENTS`, which prints the URL it answers at. Started by its constructor, killed at the
    end of a `with`; what it says on stderr goes to `log`."""

    def __init__(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SNUGFIT_")}
        clean.update(environment or {})
        self._log = log
        with log.open("a") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, env=clean
            )
        self._cpu = psutil.Process(self.process.pid)
        self._client = httpx.Client(timeout=START_SECONDS)

    def __enter__(self) -> Replica:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @cached_property
    def port(self) -> int:
        """Waits until it listens. Raises SystemExit when it ends before."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := _URL.search(line):
                return int(found[1])
        raise SystemExit(f"a replica ended with {self.process.wait()} before it listened, see {self._log}")

    def wait_until_ready(self) -> None:
        """Until /ready says 200, as a readiness probe would."""
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"a replica did not become ready, see {self._log}")
            time.sleep(0.05)

    def metrics(self) -> str:
        return self._client.get(f"{self.url}/metrics").text

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        families = text_string_to_metric_families(self.metrics())
        return sum(s.value for family in families for s in family.samples if s.name == name)

    def cpu_seconds(self) -> float:
        times = self._cpu.cpu_times()
        return float(times.user + times.system)

    def terminate(self) -> float:
        """SIGTERM, and the seconds until the process has ended. Raises SystemExit unless it ends with 0."""
        started = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(START_SECONDS)
        if code:
            raise SystemExit(f"a replica ended with {code} on SIGTERM, see {self._log}")
        self._shut()
        return time.monotonic() - started

    def kill(self) -> None:
        """Whatever state it is in. Idempotent."""
        self.process.kill()
        self.process.wait()
        self._shut()

    def _shut(self) -> None:
        self._client.close()
        if self.process.stdout:
            self.process.stdout.close()

    def _ready(self) -> bool:
        try:
            return self._client.get(f"{self.url}/ready").status_code == httpx.codes.OK
        except httpx.TransportError:
            return False
