"""The flags of a command, made from Settings: a field that is added there is a flag here."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loader.usage import Parser
from service.settings import Settings, explain
from service.sources import flag_name

GROUPS = {
    "model": "model",
    "memory": "memory",
    "http": "HTTP",
    "log": "log",
    "telemetry": "metrics and traces",
}
LIST_FIELDS = frozenset({"api_key", "cors_origins"})


def add_flags(parser: Parser, groups: Collection[str] = GROUPS.keys()) -> None:
    """Give `parser` every setting of `groups`, and --config. Values stay text: Settings checks them."""
    for name in groups:
        section = parser.add_argument_group(GROUPS[name])
        for field in Settings.model_fields:
            if explain(field)["group"] == name:
                _add_flag(section, field)
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml",
        help="Settings file. Flags win over SNUGFIT_… variables, and those over the file. [$SNUGFIT_CONFIG]",
    )  # fmt: skip


def _add_flag(section: argparse._ArgumentGroup, field: str) -> None:
    options: dict[str, Any] = {
        "metavar": explain(field)["metavar"],
        "help": help_text(field).replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    if field == "model":
        section.add_argument(field, nargs="?", **options)
    else:
        section.add_argument(
            flag_name(field), dest=field, action="append" if field in LIST_FIELDS else "store", **options
        )


def help_text(field: str) -> str:
    """The meaning of a field, and its default when it has one."""
    default = default_text(field)
    return (Settings.model_fields[field].description or "") + (f" [{default}]" if default else "")


def default_text(field: str) -> str:
    """The default as a person would write it; "" when there is none."""
    default = Settings.model_fields[field].default
    return "" if default in (None, ()) else f"{default:g}" if isinstance(default, float) else str(default)


def typed_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """What was typed, by field: `load_settings` takes it. A repeated flag is joined by commas."""
    typed = {field: value for field, value in vars(parsed).items() if field in Settings.model_fields}
    return {field: ",".join(value) if isinstance(value, list) else value for field, value in typed.items()}
