"""`snugfit export`: flags or a TOML file, then the plan, then the run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporter import show
from exporter.destination import finished_before, refuse_bad_place
from exporter.errors import NeedsDownload
from exporter.logits.compare import check_comparable
from exporter.plan import ExportPlan, keeps_remote_code, make_plan
from exporter.progress import Bar, JsonLines, event, tell
from exporter.room import check_room
from exporter.spec import KEYS, USAGE, ExportSpec, from_toml, make_spec
from loader import checkpoint, hub
from loader.checkpoint import ModelSpec
from loader.errors import HubError
from loader.usage import Parser

# Of a hub model, besides what loading it takes.
MORE = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README.md", "additional_chat_templates/*")
DESCRIPTION = (
    "Merges LoRA adapters into a base model of any usual precision (bf16, fp16, fp32, GPTQ, AWQ, "
    "bitsandbytes, compressed-tensors, fp8) and writes bf16 safetensors. Without an adapter it turns the "
    "base into bf16. It can be stopped at any time: the same command goes on where it was."
)


def run(argv: Sequence[str]) -> int:
    """Exit code 0 when the export is there, whether this run or an earlier one made it."""
    parsed = _parser().parse(argv)
    spec = make_spec(_values(parsed))
    as_json = parsed.json or not (parsed.dry_run or sys.stdout.isatty())
    plan = _plan(spec)
    _check(plan)
    _print_plan(plan, as_json)
    if not parsed.dry_run:
        _carry_out(_with_weights_here(plan), as_json)
    return 0


def _plan(spec: ExportSpec) -> ExportPlan:
    try:
        return make_plan(spec)
    except NeedsDownload:  # the shapes of this format stand in its tensors
        return make_plan(spec, base=hub.fetched(checkpoint.read_any(spec.base), MORE))


def _check(plan: ExportPlan) -> None:
    """Everything that can be known before a weight is read: also for a dry run, and before a download."""
    refuse_bad_place(plan)
    if plan.spec.check_logits:
        check_comparable(plan.spec.base, plan.config)
    is_here = plan.carried is not None
    if not is_here or finished_before(plan) is None:
        check_room(plan)


def _with_weights_here(plan: ExportPlan) -> ExportPlan:
    """The same plan for files on this machine: what is on the hub is downloaded first."""
    if not any(base.revision for base in (plan.base, plan.original) if base is not None):
        return plan
    more = (*MORE, "*.py") if keeps_remote_code(plan.base) else MORE
    original = hub.fetched(plan.original) if plan.original else None
    return make_plan(plan.spec, _fetched(plan.base, more), original)


def _fetched(base: ModelSpec, more: tuple[str, ...]) -> ModelSpec:
    try:
        return hub.fetched(base, more)
    except HubError:
        if base.path is None:
            raise
        return base  # without a network a model that was cached for serving comes without its licence


def _carry_out(plan: ExportPlan, as_json: bool) -> None:
    from exporter.export import export

    if as_json:
        done = export(plan, JsonLines(sys.stdout))
        event(sys.stdout, "done", **show.summary_json(plan, done))
        return
    with Bar(sys.stderr) as bar:
        done = export(plan, bar)
    tell(sys.stdout, "\n".join(show.summary(plan, done)))


def _print_plan(plan: ExportPlan, as_json: bool) -> None:
    if as_json:
        event(sys.stdout, "plan", **show.plan_json(plan))
    else:
        tell(sys.stdout, "\n".join(show.plan_lines(plan)))


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
