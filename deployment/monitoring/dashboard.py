"""Writes helm/dashboards/snugfit.json, Grafana's: `python -m deployment.monitoring.dashboard [--check]`.

Rows and panels are in `deployment.monitoring.panels`; places, ids and Grafana's settings follow from them.
Exit code 1 when --check finds the file out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from deployment import ROOT
from deployment.monitoring.panels import ROWS, Panel, Query, Row

DASHBOARD = ROOT / "helm" / "dashboards" / "snugfit.json"
COLUMNS = 24  # of Grafana's grid
HEIGHTS = {"stat": 4, "timeseries": 8, "bargauge": 8}
# What is chosen of these narrows the choice of the variables after them.
NARROWING = ("namespace", "job")
VARIABLES = (*NARROWING, "instance", "model")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def dashboard(rows: Iterable[Row] = ROWS) -> dict[str, Any]:
    """Grafana's JSON model, for an import or a provisioned file."""
    return {
        "uid": "snugfit",
        "title": "snugfit",
        "description": "What the model servers do, and what of their budgets they take.",
        "tags": ["snugfit"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one crosshair in all panels
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_datasource(), *map(_variable, VARIABLES)]},
        "annotations": {"list": []},
        "links": [],
        "panels": list(_panels(rows)),
    }


def _datasource() -> dict[str, Any]:
    return {
        "name": "datasource",
        "label": "Data source",
        "type": "datasource",
        "query": "prometheus",
        "refresh": 1,
        "hide": 0,
    }


def _variable(label: str) -> dict[str, Any]:
    """Values of one label; build_info has all of them, from the first second on."""
    chosen = ", ".join(f'{name}=~"${name}"' for name in NARROWING[: VARIABLES.index(label)])
    query = f"label_values(snugfit_build_info{{{chosen}}}, {label})"
    return {
        "name": label,
        "label": label.capitalize(),
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": label},
        "refresh": 2,  # whenever the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",  # and series without the label, as those of a Prometheus outside a cluster
        "current": {"text": ["All"], "value": ["$__all"]},
        "hide": 0,
    }


def _panels(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
    id_, y = 1, 0
    for row in rows:
        yield _row(id_, row.title, y)
        id_, x, y, height = id_ + 1, 0, y + 1, 0
        for panel in row.panels:
            if x + panel.width > COLUMNS:
                x, y = 0, y + height
            height = HEIGHTS[panel.kind]
            yield _panel(id_, panel, {"x": x, "y": y, "w": panel.width, "h": height})
            id_, x = id_ + 1, x + panel.width
        y += height


def _row(id_: int, title: str, y: int) -> dict[str, Any]:
    place = {"x": 0, "y": y, "w": COLUMNS, "h": 1}
    return {"id": id_, "type": "row", "title": title, "gridPos": place, "collapsed": False, "panels": []}


def _panel(id_: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.decimals is not None:
        defaults["decimals"] = panel.decimals
    if panel.top is not None:
        defaults["max"] = panel.top
    if panel.kind == "timeseries":
        defaults["custom"] = {"lineWidth": 1, "fillOpacity": 8, "showPoints": "never"}
    return {
        "id": id_,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.about,
        "gridPos": place,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": _options(panel.kind),
        "targets": [_target(n, query) for n, query in enumerate(panel.queries)],
    }


def _options(kind: str) -> dict[str, Any]:
    if kind == "timeseries":
        legend = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
        return {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    latest = {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}}
    if kind == "stat":
        return {**latest, "colorMode": "value", "graphMode": "area", "textMode": "auto"}
    return {**latest, "orientation": "horizontal", "displayMode": "basic"}


def _target(n: int, query: Query) -> dict[str, Any]:
    return {
        "refId": chr(ord("A") + n),
        "datasource": SOURCE,
        "expr": query.expr,
        "legendFormat": query.legend,
        "editorMode": "code",
        "range": True,
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m deployment.monitoring.dashboard", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is there, and write nothing")
    if not parser.parse_args().check:
        DASHBOARD.parent.mkdir(parents=True, exist_ok=True)
        DASHBOARD.write_text(text(), encoding="utf-8", newline="\n")
    elif not DASHBOARD.is_file() or DASHBOARD.read_text(encoding="utf-8") != text():
        print(f"{DASHBOARD} is out of date: run python -m deployment.monitoring.dashboard", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
