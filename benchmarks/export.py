"""Exports beside `cp` and beside peft, in one run: python -m benchmarks.export MODEL ADAPTER [--peft].

Wall time, CPU time and peak resident memory of `snugfit export` in a process of its own; of `cp` and fsync of
as many bytes as it writes; with --peft, of loading the base with transformers, peft's merge_and_unload and
save_pretrained, and whether all tensors came out the same, bit by bit. What is written goes into --work and
is removed again. With --limit 1GiB the export runs in a control group of that much memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.cgroup import Cgroup
from loader import checkpoint
from loader.budget import parse_bytes
from loader.checkpoint import ModelSpec

COMPARE_BYTES = 2**24
PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out, shard = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size=shard)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


@dataclass(frozen=True)
class Run:
    """One process, from start to end, and the disk caught up with it."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int  # resident, as the kernel counts it


def measured(command: Sequence[str | Path], join: Callable[[], None] | None = None) -> Run:
    """Run a command, then sync the disk; both count. `join` puts it into a control group."""
    os.sync()
    started = time.perf_counter()
    words = [str(word) for word in command]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, preexec_fn=join)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{command[:4]} ended with exit code {process.returncode}")
    os.sync()
    return Run(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def copied(folder: Path, out: Path) -> Run:
    """cp and fsync of the weight files of a folder."""
    out.mkdir()
    script = 'cp "$0"/*.safetensors "$1"/ && sync "$1"/*.safetensors'
    return measured(["sh", "-c", script, folder, out])


def different_tensors(one: ModelSpec, other: ModelSpec) -> list[str]:
    """Tensors that only one model has, or that differ in dtype, shape or any bit."""
    first, second = ({t.name: t for t in spec.tensors} for spec in (one, other))
    found = sorted(first.keys() ^ second.keys())
    for name in sorted(first.keys() & second.keys()):
        pairs = zip(content(one, name), content(other, name), strict=False)
        a, b = first[name], second[name]
        if (a.dtype, a.shape) != (b.dtype, b.shape) or any(x != y for x, y in pairs):
            found.append(name)
    return found


def content(spec: ModelSpec, name: str) -> Iterator[bytes]:
    info = next(t for t in spec.tensors if t.name == name)
    assert spec.path is not None
    with (spec.path / info.file).open("rb") as stream:
        stream.seek(info.start)
        for at in range(0, info.n_bytes, COMPARE_BYTES):
            yield stream.read(min(COMPARE_BYTES, info.n_bytes - at))


def predicted(spec: ModelSpec) -> dict[str, Any]:
    """What arithmetic says: bytes to read and to write, elements to compute."""
    return {"read_bytes": spec.file_bytes, "elements": sum(prod(t.shape) for t in spec.tensors)}


def bench(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    spec = checkpoint.read_any(arguments.model)
    print(f"{arguments.model.name}: {predicted(spec)}", flush=True)
    ours, theirs, copy = work / "ours", work / "peft", work / "copy"
    export = export_command(arguments, ours)
    rows: dict[str, Run] = {}
    for _ in range(arguments.repeats):
        shutil.rmtree(ours, ignore_errors=True)
        with Cgroup(arguments.limit) if arguments.limit else nullcontext() as group:
            rows["snugfit"] = best(rows.get("snugfit"), measured(export, group and group.join))
            limited = {"limit_bytes": arguments.limit, "group_peak_bytes": group.peak_bytes} if group else {}
        shutil.rmtree(copy, ignore_errors=True)
        rows["cp"] = best(rows.get("cp"), copied(ours, copy))
    shutil.rmtree(copy)
    result: dict[str, Any] = {
        "benchmark": "export",
        "model": arguments.model.name,
        **predicted(spec),
        **limited,
    }
    if arguments.peft:
        rows["peft"] = measured(
            [sys.executable, "-c", PEFT, arguments.model, arguments.adapter, theirs, arguments.shard_size]
        )
        odd = different_tensors(checkpoint.read_any(ours), checkpoint.read_any(theirs))
        result["different_tensors"] = odd
        print(f"tensors that differ from peft's: {len(odd)} {odd[:3]}", flush=True)
    for name, run in rows.items():
        rate = f"{run.wall_seconds / rows['snugfit'].wall_seconds:.2f} of ours"
        print(f"  {name:<8} {run.wall_seconds:7.1f} s ({rate}), CPU {run.cpu_seconds:.1f} s, "
              f"peak {run.peak_bytes / 2**20:,.0f} MiB", flush=True)  # fmt: skip
    return result | {name: asdict(run) for name, run in rows.items()}


def best(before: Run | None, now: Run) -> Run:
    """The faster of two runs, with the larger peak of memory."""
    if before is None:
        return now
    faster = min(before, now, key=lambda run: run.wall_seconds)
    return Run(faster.wall_seconds, faster.cpu_seconds, max(before.peak_bytes, now.peak_bytes))


def export_command(arguments: argparse.Namespace, out: Path) -> list[str]:
    words = [sys.executable, "-m", "exporter", "--base", arguments.model, "--adapter", arguments.adapter,
             "--out", out, "--shard-size", arguments.shard_size]  # fmt: skip
    return [str(word) for word in words]


def add_arguments(parser: argparse.ArgumentParser, shard_size: str) -> None:
    """What every benchmark of exports is told."""
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--shard-size", default=shard_size)
    parser.add_argument("--work", type=Path, default=Path("build/export-benchmark"))


def run(bench: Callable[[argparse.Namespace, Path], dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Bench in an empty folder, print the result as a line of JSON, and remove the folder."""
    shutil.rmtree(arguments.work, ignore_errors=True)
    arguments.work.mkdir(parents=True)
    try:
        print(json.dumps(bench(arguments, arguments.work)))
    finally:
        shutil.rmtree(arguments.work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, shard_size="1.88GB")
    parser.add_argument("--peft", action="store_true")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--limit", type=parse_bytes, metavar="SIZE", help="memory of the export's control group"
    )
    run(bench, parser.parse_args())


if __name__ == "__main__":
    main()
