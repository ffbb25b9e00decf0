"""Kills an export at random moments: python -m benchmarks.export_killed MODEL ADAPTER [--kills 20].

Every time it is started again by the same command, as Kubernetes does. Looked at after each kill: that
nothing stands under the output's name but a whole export (a kill may come after the rename), and how many
shards were begun and are not in the journal, which the next run writes again. At the end: whether every file
is the same as that of an export which nobody disturbed.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.export import add_arguments, export_command, run
from exporter import manifest
from exporter.destination import damaged
from exporter.errors import VerificationFailed
from exporter.staging import JOURNAL, MODEL, staging_folder


def start(arguments: argparse.Namespace, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(export_command(arguments, out), stdout=subprocess.DEVNULL)


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
    return found is None or bool(damaged(out, found))


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
    add_arguments(parser, shard_size="100MB")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    run(bench, parser.parse_args())


if __name__ == "__main__":
    main()
