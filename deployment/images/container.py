"""A container as a careful platform runs it: it can write to /tmp and its volumes, and gain no rights."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from types import TracebackType

from deployment.images.engine import call, log, podman

SCRATCH = "/tmp"  # noqa: S108
HARDENED = (
    "--no-healthcheck", "--read-only", "--read-only-tmpfs=false", "--tmpfs", SCRATCH, "--cap-drop", "all",
    "--security-opt", "no-new-privileges", "--network", "host", "--memory", "2g", "--pids-limit", "200",
)  # fmt: skip
_count = itertools.count(1)


def options(volumes: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> list[str]:
    """Options of `podman run`; volumes are FROM:TO[:ro]."""
    words = [*HARDENED, *(word for volume in volumes for word in ("--volume", volume))]
    return words + [word for pair in (environment or {}).items() for word in ("--env", "=".join(pair))]


def finished(
    image: str, arguments: Sequence[str], volumes: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run a container to its end; the exit code is the program's."""
    return call("podman", "run", "--rm", *options(volumes), image, *arguments)


class Container:
    """Started by `with` and removed at its end."""

    def __init__(
        self,
        image: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        volumes: Sequence[str] = (),
    ) -> None:
        self.name = f"snugfit-image-{os.getpid()}-{next(_count)}"
        self._words = [*options(volumes, environment), image, *arguments]

    def __enter__(self) -> Container:
        podman("run", "--detach", "--name", self.name, *self._words)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        call("podman", "rm", "--force", "--time", "0", self.name)

    def run(
        self, *command: str, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside."""
        words = [word for pair in (environment or {}).items() for word in ("--env", "=".join(pair))]
        return call("podman", "exec", *words, self.name, *command)

    def read(self, path: str) -> str:
        return self.run("cat", path).stdout

    def signal(self, name: str) -> None:
        podman("kill", "--signal", name, self.name)

    def wait(self, seconds: float) -> tuple[int, float]:
        """Exit code, and the seconds until it was there. Raises Failed after `seconds`."""
        started = time.monotonic()
        code = int(podman("wait", "--interval", "20ms", self.name, seconds=seconds))
        return code, time.monotonic() - started

    def log(self) -> str:
        return log(self.name)
