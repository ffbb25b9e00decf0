"""Writes docs/config.md from Settings: `python -m service.config_doc`; with --check it only compares.

Exit code 1 when --check finds the page out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from service.flags import GROUPS, LIST_FIELDS, default_text
from service.settings import Settings, explain
from service.sources import env_name, flag_name

PAGE = Path(__file__).resolve().parent.parent / "docs" / "config.md"
INTRODUCTION = """\
# Configuration

<!-- Made from service/settings.py by `python -m service.config_doc`. Do not edit by hand. -->

Every setting of `snugfit serve` can be given as a flag, as an environment variable or in a TOML file.
A flag wins over the environment, that over the file, that over the default.

- The file is named by `--config FILE.toml` or `SNUGFIT_CONFIG`. Keys stand at the top level:
  [examples/snugfit.toml](../examples/snugfit.toml).
- An unknown flag, key or `SNUGFIT_…` variable stops the start with exit code 2, and so does a value that is
  not accepted. An environment variable that is empty counts as not set.
- Lists are separated by commas in flags and variables, and a flag may be repeated; in TOML they are arrays.
- `budget` and `max_memory` say the same thing in two ways. Give one; a flag of either hides the other from
  the environment and the file.
- Sizes are in decimal (kB, MB, GB: powers of 1000) or binary units (KiB, MiB, GiB: powers of 1024).
- Paths are relative to the folder the command runs in.
- In Kubernetes, a Service named `snugfit` puts `SNUGFIT_PORT=tcp://…` and the like into every pod: set
  `enableServiceLinks: false`.

`snugfit plan` reads the same settings, and three flags of its own: `--gpu SIZE`, `--json`, `--helm-values`.
"""
HEAD = "| flag | TOML key | environment | default | meaning |\n|---|---|---|---|---|"
TITLES = {
    "model": "The model", "memory": "Memory", "http": "HTTP", "log": "Log", "telemetry": "Metrics and traces",
}  # fmt: skip


def page() -> str:
    """The whole page as Markdown."""
    return "\n".join([INTRODUCTION, *(section for group in GROUPS for section in _section(group))])


def _section(group: str) -> Iterator[str]:
    yield f"## {TITLES[group]}\n\n{HEAD}"
    yield from (_row(field) for field in Settings.model_fields if explain(field)["group"] == group)
    yield ""


def _row(field: str) -> str:
    flag = flag_name(field) if field == "model" else f"{flag_name(field)} {explain(field)['metavar']}"
    default = f"`{default_text(field)}`" if default_text(field) else "none" if field in LIST_FIELDS else "-"
    meaning = Settings.model_fields[field].description
    return f"| `{flag}` | `{field}` | `{env_name(field)}` | {default} | {meaning} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service.config_doc", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is there, and write nothing")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page; default docs/config.md")
    arguments = parser.parse_args(argv)
    if not arguments.check:
        arguments.page.write_text(page(), encoding="utf-8", newline="\n")
        return 0
    if arguments.page.is_file() and arguments.page.read_text(encoding="utf-8") == page():
        return 0
    print(f"{arguments.page} is out of date: run python -m service.config_doc", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
