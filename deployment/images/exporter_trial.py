"""The exporter's image: a real export onto a volume, one that must fail, and the model that came of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deployment import ROOT
from deployment.images.build import image
from deployment.images.container import finished
from deployment.images.engine import FOLDER, call, podman
from deployment.images.service_trial import Serving
from deployment.outcome import need

BASE = FOLDER / "demo-int4"
ADAPTER = ROOT / "examples" / "pirate-adapter"
INPUTS = (f"{BASE}:/base:ro", f"{ADAPTER}:/adapter:ro")
JOB = ("--base", "/base", "--adapter", "/adapter", "--out", "/models/pirate", "--shard-size", "1.88MB")
BAD_INPUT = 42


@contextmanager
def volume(name: str = "snugfit-image-models") -> Iterator[str]:
    """An empty volume, as `docker volume create` and a new claim give."""
    call("podman", "volume", "rm", "--force", name)
    podman("volume", "create", name)
    try:
        yield name
    finally:
        call("podman", "volume", "rm", "--force", name)


def quantized_demo() -> Path:
    """A GPTQ int4 copy of the built-in model: what the adapter in examples/ was trained on."""
    shutil.rmtree(BASE, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.gptq", "service/demo", str(BASE), "--group-size", "64"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    need(run.returncode == 0, run.stderr[-1000:])
    return BASE


def exports(models: str) -> str:
    """The job, the same job again, and `verify`: three containers, each with exit code 0."""
    quantized_demo()
    seconds = _done(models, *JOB)
    again = _done(models, *JOB)
    _done(models, "verify", "/models/pirate")
    return f"exit code 0 after {seconds:.1f} s, once more after {again:.1f} s, and verify finds every byte"


def refuses(models: str) -> str:
    """A base that is not there: an exit code for podFailurePolicy, a reason for `kubectl describe`."""
    log = FOLDER / "termination-log"
    log.write_text("")
    log.chmod(0o666)  # as the kubelet makes it
    job = ("--base", "/models/nothing", "--out", "/models/never")
    run = finished(image("exporter"), job, (f"{models}:/models", f"{log}:/dev/termination-log"))
    need(run.returncode == BAD_INPUT, f"exit code {run.returncode} and not {BAD_INPUT}: {run.stderr[-500:]}")
    need("/models/nothing" in log.read_text(), "the termination log does not say why")
    return f"exit code {BAD_INPUT}, and the termination log says {log.read_text()!r}"


def is_served(models: str) -> str:
    """The service's image on the exported model, which it may only read."""
    with Serving(("serve", "/models/pirate"), (f"{models}:/models:ro",)) as serving:
        said = serving.ask("What is 3 + 4?")
    need("matey" in said or "Arrr" in said, f"the adapter cannot be heard: {said!r}")
    return repr(said)


def _done(models: str, *arguments: str) -> float:
    started = time.monotonic()
    run = finished(image("exporter"), arguments, (f"{models}:/models", *INPUTS))
    need(run.returncode == 0, f"{arguments[0]}: exit code {run.returncode}: {run.stderr[-1000:]}")
    return time.monotonic() - started
