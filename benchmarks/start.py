"""What a start takes, phase by phase: python -m benchmarks.start [MODEL] [--device cpu] [--runs 3].

Starts `snugfit serve` anew for each run, the files in the page cache, and reads the phases from its /metrics.
Predicted are the time that the chart's startup probe gives, which has to do for a cold disk, and the target:
when the imports are done, no more than 3 s on top of reading the weights. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median

from prometheus_client.parser import text_string_to_metric_families

from benchmarks.server import BUILT_IN, Server
from loader import checkpoint, probe
from loader.budget import MemoryBudget
from loader.helm_values import start_seconds
from loader.plan import make_plan

IMPORTS, LOAD = "importing torch", "reading weights"
BEFORE = ("starting", IMPORTS)
MORE_THAN_LOADING_SECONDS = 3


def one_start(model: Path, device: str) -> dict[str, float]:
    """Seconds of each phase, and of all from outside: from the command to the first /ready that says so."""
    began = time.monotonic()
    with Server(model, device) as server:
        whole = time.monotonic() - began
        families = text_string_to_metric_families(server.client.get("/metrics").text)
    phases = {
        sample.labels["phase"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "snugfit_start_seconds"
    }
    return {**phases, "seen from outside": whole}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=BUILT_IN)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    spec = checkpoint.read(arguments.model)
    plan = make_plan(spec, MemoryBudget.parse(None, None, arguments.device, probe.machine()))
    print(f"{arguments.model}: {spec.file_bytes:,} bytes of weights on {plan.main_device}")
    print(f"predicted: at most {start_seconds(plan)} s, of which {MORE_THAN_LOADING_SECONDS} s at most are")
    print("neither imports nor reading weights")
    one_start(arguments.model, arguments.device)  # fills the page cache
    runs = [one_start(arguments.model, arguments.device) for _ in range(arguments.runs)]
    taken = {phase: median(run[phase] for run in runs) for phase in runs[0]}
    rest = [
        sum(run.values()) - sum(run[phase] for phase in (*BEFORE, LOAD, "seen from outside")) for run in runs
    ]
    for phase, seconds in taken.items():
        print(f"{phase:>32} {seconds:7.2f} s")
    print(f"{'beside imports and weights':>32} {max(rest):7.2f} s at most in {len(rest)} runs")
    row = {
        "benchmark": "start", "model": arguments.model.name, "device": plan.main_device,
        "weights_bytes": spec.file_bytes, "startup_probe_s": start_seconds(plan),
        "phases_s": {phase: round(seconds, 3) for phase, seconds in taken.items()},
        "beside_s": round(max(rest), 3), "target_met": max(rest) <= MORE_THAN_LOADING_SECONDS,
    }  # fmt: skip
    print(json.dumps(row))


if __name__ == "__main__":
    main()
