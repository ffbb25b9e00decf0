"""`docker compose config` over compose.yaml, and over copies with a fault each, which it must refuse."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from deployment import ROOT
from deployment.outcome import Skipped, need
from deployment.tools import TOOLS

FILE, GPU = ROOT / "compose.yaml", ROOT / "compose" / "gpu.yaml"
# What is replaced by what, each once.
FAULTS = {
    "an unknown key": ("read_only: true", "read_onyl: true"),
    "a dependency that is no service": ("exporter: {condition", "exporters: {condition"),
    "a volume that is not declared": ("models:/models:ro", "model:/models:ro"),
    "a condition that does not exist": ("service_completed_successfully", "service_succeeded"),
}


def compose() -> list[str]:
    """The command before its options. Raises Skipped where there is none."""
    if shutil.which("docker") and _runs(["docker", "compose", "version"]):
        return ["docker", "compose"]
    for path in (shutil.which("docker-compose"), TOOLS / "docker-compose" / "docker-compose"):
        if path and Path(path).is_file():
            return [str(path)]
    raise Skipped(
        f"docker compose is not installed: neither its plugin nor docker-compose, on PATH or in {TOOLS}"
    )


def config() -> str:
    command = compose()
    for files in ((FILE,), (FILE, GPU)):
        run = _config(command, *files)
        need(run.returncode == 0, f"{files[-1].name}: {run.stderr.strip()}")
    for fault, (old, new) in FAULTS.items():
        need(_with_fault(command, old, new).returncode != 0, f"{fault} is not refused")
    return f"alone and with compose/gpu.yaml; refused: {', '.join(FAULTS)}"


def _with_fault(command: list[str], old: str, new: str) -> subprocess.CompletedProcess[str]:
    text = FILE.read_text(encoding="utf-8")
    need(old in text, f"compose.yaml has no {old!r} to be replaced")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "compose.yaml")
        copy.write_text(text.replace(old, new, 1), encoding="utf-8")
        return _config(command, copy)


def _config(command: list[str], *files: Path) -> subprocess.CompletedProcess[str]:
    named = [word for file in files for word in ("-f", str(file))]
    return subprocess.run([*command, *named, "config", "--quiet"], capture_output=True, text=True)


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True).returncode == 0
