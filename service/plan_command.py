"""`snugfit plan`: prints the decision. JSON and YAML go to stdout alone; logs and errors to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from loader.errors import BudgetExceeded
from loader.usage import Parser, UsageError
from service import logs
from service.flags import add_flags, typed_flags
from service.misfit import retry_command
from service.planning import make_plan_for
from service.settings import ALTERNATIVES
from service.show import print_misfit, print_plan
from service.sources import load_settings

DESCRIPTION = (
    "Shows what would go where, how many tokens of context fit and what would be offloaded, from the model's "
    "config and tensor headers alone. It reads the settings of 'snugfit serve', and plans what that would do."
)


def run(argv: Sequence[str]) -> int:
    """Exit code 0 when the model fits, 43 when it does not."""
    parsed = _parser().parse(argv)
    flags = typed_flags(parsed)
    if parsed.gpu is not None and "max_memory" in flags:
        raise UsageError(["--gpu and --max-memory: give one of them"])
    hidden = frozenset(ALTERNATIVES) if parsed.gpu is not None else frozenset()
    settings = load_settings(flags, parsed.config, hidden=hidden)
    logs.to_stderr(settings.log_level, settings.log_format)
    try:
        plan = make_plan_for(settings, parsed.gpu)
    except BudgetExceeded as err:
        if not parsed.json:
            print_misfit(err, retry_command("plan", argv, err), Console(stderr=parsed.helm_values))
            raise
        print(json.dumps(_misfit(err), indent=2))
        return err.exit_code
    if parsed.json:
        print(json.dumps(plan.to_json(), indent=2))
    elif parsed.helm_values:
        from loader.helm_values import helm_values

        print(yaml_text(helm_values(plan)))
    else:
        print_plan(plan)
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="snugfit plan",
        usage="snugfit plan [MODEL] [--budget SIZE | --gpu SIZE] [options]",
        description=DESCRIPTION,
    )
    add_flags(parser, ("model", "memory", "log"))
    section = parser.add_argument_group("plan")
    section.add_argument(
        "--gpu", metavar="SIZE",
        help="Plan for a card of this size (16GiB), here or elsewhere; CUDA context and margin come off.",
    )  # fmt: skip
    form = section.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="Print the plan for programs, on stdout alone.")
    form.add_argument("--helm-values", action="store_true", help="Print what the Helm chart needs, as YAML.")
    return parser


def _misfit(err: BudgetExceeded) -> dict[str, Any]:
    names = ("need_bytes", "have_bytes", "smallest_bytes", "weights_bytes", "kv_bytes_per_token")
    numbers = {name: getattr(err, name) for name in names}
    return {"fits": False, "device": err.device, **numbers, "hint": err.hint}


def yaml_text(values: Mapping[str, Any], indent: str = "") -> str:
    """Nested mappings as block YAML; a scalar or a list stands as JSON, which YAML contains."""
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", yaml_text(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key}: {json.dumps(value)}")
    return "\n".join(lines)
