"""Draws docs/plan.svg: what `snugfit plan` prints for a 7B at 8 GB. `--check` only compares.

`python -m docs.picture` makes the headers of the model, plans for a machine that is written down here, and so
gives the same picture everywhere. Exit code 1 when --check finds it out of date.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.make_model import make
from loader import checkpoint
from loader.budget import MemoryBudget
from loader.plan import Plan, make_plan
from loader.probe import Machine
from service.show import picture

PICTURE = Path(__file__).with_name("plan.svg")
MODEL = "Qwen/Qwen2.5-7B-Instruct"
BUDGET = "8GB"
MACHINE = Machine(ram_total_bytes=32 * 10**9, ram_free_bytes=28 * 10**9)


def plan() -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        make("7b", Path(folder), headers_only=True)
        spec = checkpoint.read(folder)
    budget = MemoryBudget.parse(BUDGET, None, "cuda", MACHINE)
    return make_plan(replace(spec, source=MODEL), budget)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.picture", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is there, and write nothing")
    check = parser.parse_args().check
    drawn = picture(plan(), f"snugfit plan {MODEL} --device cuda --budget {BUDGET}")
    if not check:
        PICTURE.write_text(drawn, encoding="utf-8", newline="\n")
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != drawn:
        print(f"{PICTURE} is out of date: run python -m docs.picture", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
