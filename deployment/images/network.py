"""How a build reaches packages: what this machine's pip is told, which the image does not keep."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# Where the base image keeps its certificates; the machine's are mounted over them while something is built.
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
ADDRESSES = ("index-url", "extra-index-url", "find-links")
PASSED_ON = ("trusted-host", "timeout", "proxy")


def build_options(folder: Path) -> list[str]:
    """Options of `buildah build`; what they name is written into `folder`."""
    settings = pip_settings()
    secret = folder / "pip.conf"
    secret.write_text(pip_conf(settings))
    options = ["--secret", f"id=pip.conf,src={secret}"]
    if "cert" in settings:
        options += ["--volume", f"{settings['cert']}:{CERTIFICATES}:ro"]
    if wheels := wheel_folder(settings):
        options += ["--build-context", f"wheels={wheels}"]
    return options


def pip_settings() -> dict[str, str]:
    """What `pip config` knows, from files and PIP_… variables; the latter win."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    return parse(listed.stdout)


def parse(listed: str) -> dict[str, str]:
    """Lines such as global.timeout='60' and :env:.timeout='60' -> timeout: 60."""
    pairs = [line.split("=", 1) for line in listed.splitlines() if "=" in line]
    in_files_first = sorted(pairs, key=lambda pair: pair[0].startswith(":env:"))
    return {name.rpartition(".")[2]: str(ast.literal_eval(value)) for name, value in in_files_first}


def pip_conf(settings: Mapping[str, str]) -> str:
    """The same for pip in the build, without what lies on this machine's disk."""
    lines = ["[global]"]
    for name in ADDRESSES:
        remote = [word for word in settings.get(name, "").split() if word.startswith(("http://", "https://"))]
        lines += [f"{name} = {' '.join(remote)}"] if remote else []
    lines += [f"{name} = {settings[name]}" for name in PASSED_ON if name in settings]
    lines += [f"cert = {CERTIFICATES}"] if "cert" in settings else []
    return "\n".join(lines) + "\n"


def wheel_folder(settings: Mapping[str, str]) -> Path | None:
    """The first folder of this machine that pip looks for wheels in; a build can have one."""
    folders = [Path(word.removeprefix("file://")) for word in settings.get("find-links", "").split()]
    return next((folder for folder in folders if folder.is_dir()), None)
