"""Building the images of the Dockerfile, and what they weigh."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from deployment import ROOT
from deployment.images import network
from deployment.images.engine import FOLDER, call, podman, program
from deployment.outcome import Failed

LOCAL_BASE = "localhost/snugfit-base"
SUITE = "bookworm"
PACKAGES = "ca-certificates,python3,python3-venv"
BUILD_SECONDS = 3600
CONTEXT = FOLDER / "context"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of an image and the instruction that made it."""

    n_bytes: int
    made_by: str


def local_base() -> str:
    """An image of Debian with its Python, made from packages: no registry is asked. Kept as a tar."""
    if call("podman", "image", "exists", LOCAL_BASE).returncode:
        tar = FOLDER / "base.tar"
        if not tar.is_file():
            _make_base(tar)
        podman("import", tar, LOCAL_BASE)
    return LOCAL_BASE


def build(target: str, base: str, arguments: tuple[str, ...] = (), name: str | None = None) -> float:
    """Build one target from CONTEXT as localhost/snugfit:TARGET, or as `name`.

    Returns seconds; raises Failed with the end of the log.
    """
    words: list[object] = ["build", "--isolation", "chroot", "--pull=false", "--layers", "--format", "docker"]
    words += [*network.build_options(FOLDER), "--build-arg", f"BASE_IMAGE={base}"]
    words += [word for argument in arguments for word in ("--build-arg", argument)]
    words += ["--target", target, "--tag", name or image(target), CONTEXT]
    started = time.monotonic()
    run = call("buildah", *words, seconds=BUILD_SECONDS)
    (FOLDER / f"build-{target}.log").write_text(run.stdout + run.stderr)
    if run.returncode:
        raise Failed((run.stdout + run.stderr).strip()[-2000:])
    return time.monotonic() - started


def image(target: str) -> str:
    return f"localhost/snugfit:{target}"


def size_bytes(name: str) -> int:
    return int(podman("image", "inspect", "--format", "{{.Size}}", name))


def layers(name: str) -> list[Layer]:
    """From the base up."""
    rows = json.loads(podman("history", "--format", "json", "--no-trunc", name))
    return [Layer(row["size"], instruction(row["CreatedBy"])) for row in reversed(rows)]


def layer_ids(name: str) -> list[str]:
    found: list[str] = json.loads(podman("image", "inspect", "--format", "{{json .RootFS.Layers}}", name))
    return found


def instruction(created_by: str) -> str:
    """A line of the history as the Dockerfile has it."""
    text = " ".join(created_by.split())
    if "#(nop)" in text:
        return text.split("#(nop)")[1].strip()
    return "RUN " + text.partition("/bin/sh -c ")[2].rpartition("target=/wheels ")[2]


def snapshot() -> None:
    """Copy into CONTEXT what the build sees: both targets are of the same code while someone works on it."""
    shutil.rmtree(CONTEXT, ignore_errors=True)
    CONTEXT.mkdir(parents=True)
    for name in (".dockerignore", "Dockerfile", *let_through()):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, CONTEXT / name)
        else:
            shutil.copy2(ROOT / name, CONTEXT)


def change() -> None:
    """A line more in one file of the service in CONTEXT."""
    with (CONTEXT / "service" / "app.py").open("a") as file:
        file.write("# changed\n")


def let_through() -> list[str]:
    """The files and folders that .dockerignore lets through."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


def _make_base(tar: Path) -> None:
    program("mmdebstrap")
    run = call("mmdebstrap", "--variant=minbase", f"--include={PACKAGES}", SUITE, tar, seconds=BUILD_SECONDS)
    if run.returncode:
        tar.unlink(missing_ok=True)
        raise Failed(f"mmdebstrap: {run.stderr.strip()[-1000:]}")
