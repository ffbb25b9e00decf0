"""Kills an export at random moments: python -m benchmarks.export_killed MODEL ADAPTER [--kills 20].

Every time it is started again by the same command, as Kubernetes does. Looked at after each kill: that
nothing stands under the output's name but a whole export (a kill may come after the rename), and how many
shards were begun and are not in the journal, which the next run writes again. At the end: whether every file
is the same as that of an export which nobody disturbed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from exporter import manifest
from exporter.errors import VerificationFailed
from exporter.staging import JOURNAL, MODEL, staging_folder


def start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "exporter", "--base", arguments.model, "--adapter", arguments.adapter,
               "--out", out, "--shard-size", arguments.shard_size]  # fmt: skip
    return subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)


def hashes(folder: Path) -> dict[str, str]:
    found = manifest.read(folder)
    assert found is not None
    return {written.file: written.sha256 for written in found.files}


def unfinished_shards(out: Path) -> tuple[int, int]:
    """(shards in the journal, shards on the disk that are not)."""
    journal, model = staging_folder(out) / JOURNAL, staging_folder(out) / MODEL
    lines = journal.read_text().count("\n") - 1 if journal.exists() else 0
    shards = len(list(model.glob("*.safetensors"))) if model.exists() else 0
    return max(lines, 0), max(shards - max(lines, 0), 0)


def is_half_written(out: Path) -> bool:
    """Whether something is under the output's name and is not whole, by its manifest and all sizes."""
    if not out.exists():
        return False
    try:
        found = manifest.read(out)
    except VerificationFailed:
        return True
    return found is None or any(size_of(out / file.file) != file.n_bytes for file in found.files)


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    started = time.perf_counter()
    if start(arguments, work / "undisturbed").wait():
        raise SystemExit("the export failed without being killed")
    seconds = time.perf_counter() - started
    dice, out = random.Random(arguments.seed), work / "killed"
    partial, redone, kept, kills = 0, [], 0, 0
    while kills < arguments.kills:
        process = start(arguments, out)
        time.sleep(dice.uniform(0, seconds))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:  # it was faster: begin again
            shutil.rmtree(out)
            continue
        kills += 1
        kept, begun = unfinished_shards(out)
        redone.append(begun)
        partial += is_half_written(out)
        print(
            f"  kill {kills}: {kept} shards kept, {begun} to be written again, visible: {out.exists()}",
            flush=True,
        )
    if start(arguments, out).wait():
        raise SystemExit("the last run failed")
    same = hashes(out) == hashes(work / "undisturbed")
    print(f"same files: {same}; at most {max(redone)} shards written again; visible half-written: {partial}")
    return {
        "benchmark": "export_killed", "model": arguments.model.name, "kills": kills, "same_files": same,
        "shards": len([name for name in hashes(out) if name.endswith(".safetensors")]),
        "most_shards_redone": max(redone), "visible_half_written": partial,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-size", default="100MB")
    parser.add_argument("--work", type=Path, default=Path("build/export-killed"))
    arguments = parser.parse_args()
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    try:
        print(json.dumps(bench(arguments, arguments.work)))
    finally:
        shutil.rmtree(arguments.work)


if __name__ == "__main__":
    main()
