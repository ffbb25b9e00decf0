"""A peer's server: started in a process group of its own, stopped in its tracks while others are measured."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from benchmarks.peers.environment import CannotRun

START_SECONDS = 900
STOP_SECONDS = 20
PROBE_SECONDS = 300  # one short answer, however cold the server is


class PeerServer:
    """Ready when the `with` block begins. Everything it starts is in its process group."""

    def __init__(self, command: list[str], environ: dict[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._command, self._log = command, log
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SNUGFIT_")}
        self._environ = kept | environ

    def __enter__(self) -> PeerServer:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=self._environ, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on()
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)  # workers that did not follow
        self._process.wait()

    def pause(self) -> None:
        """An idle server must take no time from the one that is measured: some of them spin."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def wait_until_ready(self, body: dict[str, Any]) -> None:
        """Ready is who answers. Raises CannotRun when that does not happen."""
        deadline, said = time.monotonic() + START_SECONDS, "nothing"
        with httpx.Client(base_url=self.url, timeout=PROBE_SECONDS) as client:
            while time.monotonic() < deadline:
                if self._process.poll() is not None:
                    raise CannotRun(f"exit code {self._process.returncode}: {self._last_words()}")
                try:
                    answer = client.post("/v1/chat/completions", json=body)
                except httpx.TransportError as err:
                    said = repr(err)
                else:
                    said = f"{answer.status_code} {answer.text[:300]}"
                    if answer.status_code == httpx.codes.OK:
                        return
                time.sleep(0.5)
        raise CannotRun(f"not ready after {START_SECONDS} s: it said {said}")

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        words = [line.strip() for line in lines if line.strip()]
        return f"{words[-1] if words else 'it said nothing'} ({self._log})"

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)  # it leads its group
