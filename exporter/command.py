"""`snugfit export`: flags or a TOML file, then the plan, then the run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter import show
from exporter.plan import ExportPlan, make_plan
from exporter.progress import event, shown
from exporter.room import check_room
from exporter.spec import KEYS, USAGE, from_toml, make_spec
from loader import hub
from loader.usage import Parser

# Of a hub model, besides what loading it takes.
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md")
DESCRIPTION = (
    "Merges LoRA adapters into a base model of any usual precision (bf16, fp16, fp32, GPTQ, AWQ, "
    "bitsandbytes, compressed-tensors, fp8) and writes bf16 safetensors. Without an adapter it turns the "
    "base into bf16. It can be stopped at any time: the same command goes on where it was."
)


def run(argv: Sequence[str]) -> int:
    """Exit code 0 when the export is there, whether this run or an earlier one made it."""
    parsed = _parser().parse(argv)
    spec = make_spec(_values(parsed))
    plan = make_plan(spec)
    if parsed.dry_run:
        _print_plan(plan, as_json=parsed.json)
        return 0
    as_json = parsed.json or not sys.stdout.isatty()
    _print_plan(plan, as_json)
    plan = _with_weights_here(plan)
    _carry_out(plan, as_json)
    return 0


def _carry_out(plan: ExportPlan, as_json: bool) -> None:
    from exporter.export import export, finished_before

    if finished_before(plan) is None:
        check_room(plan)
    with shown(sys.stdout if as_json else sys.stderr) as report:
        done = export(plan, report)
    if as_json:
        event(sys.stdout, "done", **show.summary_json(plan, done))
    else:
        print("\n".join(show.summary(plan, done)))


def _with_weights_here(plan: ExportPlan) -> ExportPlan:
    """The same plan for files on this machine: what is on the hub is downloaded first."""
    bases = [base for base in (plan.base, plan.original) if base is not None]
    if not any(base.revision for base in bases):
        return plan
    for base in bases:
        if base.revision is not None:
            hub.download(base.source, base.revision, LICENCES)
    return make_plan(plan.spec)


def _print_plan(plan: ExportPlan, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"event": "plan", **show.plan_json(plan)}, ensure_ascii=False), flush=True)
    else:
        print("\n".join(show.plan_lines(plan)), flush=True)


def _values(parsed: argparse.Namespace) -> dict[str, Any]:
    """What a spec file says, and over it what was typed."""
    typed = {key: value for key, value in vars(parsed).items() if key in KEYS and value not in (None, False)}
    return {**(from_toml(parsed.config) if parsed.config else {}), **typed}


def _parser() -> Parser:
    parser = Parser(prog="snugfit export", usage=USAGE + " [options]", description=DESCRIPTION)
    what = parser.add_argument_group("what")
    what.add_argument(
        "--base", metavar="MODEL", help="What the adapter was trained on: a folder or a hub id."
    )
    what.add_argument(
        "--adapter", dest="adapters", action="append", metavar="ADAPTER[:WEIGHT]",
        help="A LoRA adapter's folder or hub id; several are summed, each times its weight.",
    )  # fmt: skip
    what.add_argument(
        "--original-base", metavar="MODEL",
        help="Merge onto this 16-bit original of a quantized base, and report how far the two are apart.",
    )  # fmt: skip
    how = parser.add_argument_group("output")
    how.add_argument(
        "--out", metavar="DIR", help="The folder to make. It is there when it is whole, not before."
    )
    how.add_argument(
        "--shard-size", metavar="SIZE", help="Of one file: 1.88GB, 2GiB, 1880000000; 1.88 alone is GB. [5GB]"
    )
    how.add_argument("--overwrite", action="store_true", help="Replace another export in --out.")
    how.add_argument("--oci", metavar="DIR", help="Also write an OCI image layout (KServe ModelCar).")
    how.add_argument(
        "--check-logits", action="store_true",
        help="Before publishing, compare answers with those of base and adapter unmerged.",
    )  # fmt: skip
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml",
        help="The same as keys: base, adapters (a list), original_base, out, shard_size, … Flags win.",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="Print the plan; read headers only, write nothing."
    )
    parser.add_argument("--json", action="store_true", help="JSON lines, as without a terminal.")
    return parser
