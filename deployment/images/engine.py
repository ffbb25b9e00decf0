"""buildah and podman with a store of their own in build/image: removing the folder removes everything.

Made for root on a machine without a container daemon. Containers use the host's network: they are talked to
on 127.0.0.1 and a free port.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from deployment import ROOT
from deployment.outcome import Failed, Skipped

FOLDER = ROOT / "build" / "image"
# The limits that podman sets by itself are above what an unprivileged root may set.
CONTAINERS = """[containers]
default_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]
netns = "host"
log_driver = "k8s-file"

[engine]
cgroup_manager = "cgroupfs"
"""
RUNC = 'runtime = "runc"\n'  # crun refuses a machine whose control groups are half v1, half v2
STORAGE = """[storage]
driver = "overlay"
graphroot = "{0}/storage"
runroot = "{0}/run"
"""


def program(name: str) -> str:
    """The path of a program. Raises Skipped where it is not installed."""
    found = shutil.which(name)
    if not found:
        raise Skipped(f"{name} is not installed: apt-get install {name}")
    return found


def podman(*words: object, seconds: float = 600) -> str:
    """The output of a podman command. Raises Failed with what it said, when it failed."""
    return _output(call("podman", *words, seconds=seconds))


def call(name: str, *words: object, seconds: float = 600) -> subprocess.CompletedProcess[str]:
    """Run buildah or podman on our store; the exit code is the caller's to look at."""
    command = [program(name), *map(str, words)]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=environment(), cwd=ROOT
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{name} {words[0]} did not end within {seconds:g} s") from None


def log(container: str) -> str:
    """What a container has written, the end of it."""
    run = call("podman", "logs", "--tail", "30", container)
    return run.stdout + run.stderr


def environment() -> dict[str, str]:
    """Points the programs at our store; the files are written when they are not there."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    containers, storage = FOLDER / "containers.conf", FOLDER / "storage.conf"
    containers.write_text(CONTAINERS + (RUNC if shutil.which("runc") else ""))
    storage.write_text(STORAGE.format(FOLDER))
    return {**os.environ, "CONTAINERS_CONF": str(containers), "CONTAINERS_STORAGE_CONF": str(storage)}


def _output(run: subprocess.CompletedProcess[str]) -> str:
    if run.returncode:
        raise Failed(f"{' '.join(run.args[:3])} … ended with {run.returncode}: {run.stderr.strip()[-2000:]}")
    return run.stdout
