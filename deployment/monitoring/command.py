"""`make monitoring`: rules and dashboard against a real Prometheus that scrapes real services.

Each query of the dashboard must have had a value other than 0, each recording rule a value, and each alert's
condition must have been met, by a run in which everything goes wrong that the alerts are about. Prints one
table; exit code 1 when a check failed. What a tool is missing for is skipped, and says so. With `--picture
FILE.png` the panels are drawn, too, and a picture is taken of them.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from deployment import ROOT
from deployment.monitoring import page
from deployment.monitoring.live import MODEL, Run, compiler, run
from deployment.monitoring.panels import ROWS, Panel, Query
from deployment.monitoring.prometheus import Refused, Series

RULES = ROOT / "helm" / "rules" / "snugfit.yaml"
RULES_TEST = ROOT / "tests" / "deployment" / "rules_test.yaml"
FOLDER = ROOT / "build" / "monitoring"
TRAFFIC_SECONDS = 40
WIDTH = 120  # of the table
# What Grafana would put in for its variables: it takes four scrapes for the interval.
VARIABLES = {"$__rate_interval": "4s", "$namespace": ".*", "$job": ".*", "$instance": ".*"}
# Alerts whose condition cannot be brought about here, and why; tests/deployment/rules_test.yaml has them all.
NOT_PROVOKED = {"SnugfitExporterFailed": "its metric is kube-state-metrics', which needs a cluster"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the table. `passed` is None for what was skipped."""

    what: str
    passed: bool | None
    found: str


def filled_in(expr: str, model: str = ".*") -> str:
    for variable, value in {**VARIABLES, "$model": model}.items():
        expr = expr.replace(variable, value)
    return expr


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def static_checks() -> Iterator[Check]:
    if not shutil.which("promtool"):
        yield Check("promtool", None, "not installed: apt-get install prometheus")
        return
    yield _promtool("promtool check rules", "check", "rules", str(RULES))
    yield _promtool("promtool test rules", "test", "rules", str(RULES_TEST))


def live_checks(done: Run) -> Iterator[Check]:
    yield _promtool("promtool check config", "check", "config", str(done.configuration))
    for name, text in done.exposed.items():
        yield _promtool(f"promtool check metrics, {name}", "check", "metrics", text=text)
    answers = ", ".join(f"{count} x {status or 'left'}" for status, count in sorted(done.statuses.items()))
    wanted = {0, 200, 400, 404, 429, 503}
    yield Check("traffic", wanted <= set(done.statuses), answers)
    for name in ("job", "instance", "model"):
        values = done.prometheus.values_of(name, "snugfit_build_info")
        yield Check(f"variable {name}", bool(values), ", ".join(values))
    yield from (_panel(done, panel) for row in ROWS for panel in row.panels)
    yield from (_rule(done, rule) for rule in rules())


def _promtool(what: str, *arguments: str, text: str | None = None) -> Check:
    command = [shutil.which("promtool") or "", *arguments]
    ended = subprocess.run(command, input=text, capture_output=True, text=True)
    said = (ended.stdout + ended.stderr).strip()
    passed = ended.returncode == 0 and (text is None or not said)  # `check metrics` warns with exit code 0
    return Check(what, passed, _first_line(said) if passed else said)


def _first_line(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if "SUCCESS" in line]
    return lines[0] if lines else said or "clean"


def _panel(done: Run, panel: Panel) -> Check:
    empty = [query.legend for query in panel.queries if not _moved(_answers(done, query))]
    found = f"nothing but 0 or no data: {', '.join(empty)}" if empty else f"{len(panel.queries)} queries"
    return Check(f"panel {panel.title}", not empty, found)


def _moved(series: list[Series]) -> bool:
    return any(value for one in series for _, value in one.points)


def _answers(done: Run, query: Query) -> list[Series]:
    return done.prometheus.over(filled_in(query.expr), done.start, done.end)


def _rule(done: Run, rule: dict[str, Any]) -> Check:
    name = rule.get("alert") or rule["record"]
    if name in NOT_PROVOKED:
        return Check(f"alert {name}", None, NOT_PROVOKED[name])
    series = done.prometheus.over(rule["expr"], done.start, done.end)
    seconds = max((len(one.points) for one in series), default=0)
    if "record" in rule:
        return Check(f"record {name}", seconds > 0, f"{len(series)} series")
    return Check(f"alert {name}", seconds > 0, f"its condition was met for {seconds} s")


def _draw(done: Run, picture: Path) -> Check:
    """The dashboard as it was with the real model chosen, before things broke, and a picture of it."""

    def ask(query: Query) -> tuple[Query, list[Series]]:
        return query, done.prometheus.over(filled_in(query.expr, MODEL), done.start, done.calm)

    answers = {panel: [ask(query) for query in panel.queries] for row in ROWS for panel in row.panels}
    drawn = FOLDER / "dashboard.html"
    height = page.write(drawn, answers, done.start, done.calm)
    if not page.photograph(drawn, picture, height):
        return Check("picture", None, "no chromium: apt-get install chromium fonts-dejavu-core")
    return Check("picture", True, f"{picture}, {picture.stat().st_size:,} bytes")


def checks(seconds: float, picture: Path | None) -> Iterator[Check]:
    yield from static_checks()
    missing = _missing()
    if missing:
        yield Check("a real Prometheus", None, missing)
        return
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    with run(FOLDER, RULES, seconds) as done:
        yield from _guarded(lambda: live_checks(done))
        if picture:
            yield _draw(done, picture)


def _missing() -> str | None:
    if not (shutil.which("prometheus") and shutil.which("promtool")):
        return "not installed: apt-get install prometheus"
    return None if compiler() else "no C compiler, for a stand-in of the driver: apt-get install gcc"


def _guarded(work: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from work()
    except Refused as err:
        yield Check("query", False, str(err))


def show(found: list[Check]) -> None:
    table = Table("check", "", "found", box=None)
    table.columns[0].no_wrap = True
    words = {True: "ok", False: "[bold red]FAILED[/]", None: "[yellow]SKIPPED[/]"}
    for check in found:
        table.add_row(check.what, words[check.passed], check.found)
    console = Console(width=WIDTH)
    console.print(table)
    counts = [sum(check.passed is state for check in found) for state in (True, False, None)]
    console.print("{} passed, {} failed, {} skipped".format(*counts))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deployment.monitoring")
    parser.add_argument("--seconds", type=float, default=TRAFFIC_SECONDS, help="of traffic")
    parser.add_argument("--picture", type=Path, help="a PNG of the dashboard's panels to write")
    arguments = parser.parse_args()
    found = list(checks(arguments.seconds, arguments.picture))
    show(found)
    return 1 if any(check.passed is False for check in found) else 0
