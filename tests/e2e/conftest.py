import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 30


class Program:
    """serve_scripted.py as a process; `log()` is its stderr so far."""

    def __init__(self, environment, log_file):
        self._log_file = log_file
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SNUGFIT_", "CUDA_", "FAKE_NVML"))}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log_file.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "serve_scripted.py")],
                env={**clean, "PYTHONPATH": os.pathsep.join(paths), **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.log()

    def wait_until_ready(self):
        deadline = time.monotonic() + DEADLINE_S
        while not self._ready():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def get(self, path):
        return httpx.get(self.url + path, timeout=DEADLINE_S)

    def log(self):
        return self._log_file.read_text(encoding="utf-8")

    def stop(self):
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.process.stdout.close()

    def _ready(self):
        try:
            return self.get("/ready").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def program(tmp_path):
    """`with program(NAME="value") as running:` a service that is ready."""

    @contextmanager
    def run(**environment):
        running = Program(environment, tmp_path / "stderr.log")
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.stop()

    return run
