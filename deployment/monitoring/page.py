"""The dashboard's panels as one page, where Grafana is not to be had: the same queries, titles, places."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from deployment.monitoring.charts import Chart, draw
from deployment.monitoring.panels import ROWS, Panel, Query
from deployment.monitoring.prometheus import Series

Answers = Mapping[Panel, Sequence[tuple[Query, list[Series]]]]

COLUMN_PX, GAP_PX = 58, 8
WIDTH_PX = 24 * COLUMN_PX
HEIGHT_PX = {"stat": 96, "timeseries": 236, "bargauge": 236}
TITLE_PX, ROW_PX = 62, 30
STYLE = """
body { margin: 0; padding: 0 8px; background: #f4f5f7; font: 13px "DejaVu Sans", sans-serif; color: #24292f }
h1 { font-size: 18px; margin: 0; padding-top: 12px; height: 24px } h1 + p { margin: 0; height: 26px }
h2 { font-size: 13px; margin: 0; height: 30px; line-height: 32px; color: #57606a }
div { position: relative } svg { position: absolute; background: #fff; border: 1px solid #d0d7de }
"""


def write(path: Path, answers: Answers, start: float, end: float) -> int:
    """The page; returns its height in pixels."""
    parts, height = [], TITLE_PX
    for row in ROWS:
        charts = [_chart(panel, answers[panel], start, end) for panel in row.panels]
        drawn, row_height = _laid_out(charts)
        parts.append(f'<h2>{escape(row.title)}</h2><div style="height:{row_height}px">{drawn}</div>')
        height += ROW_PX + row_height
    about = (
        f"The queries of helm/dashboards/snugfit.json with one model chosen, answered by a Prometheus that "
        f"scraped three services for {end - start:.0f} s, drawn without Grafana."
    )
    head = f"<!doctype html><meta charset=utf-8><title>snugfit</title><style>{STYLE}</style>"
    path.write_text(f"{head}<h1>snugfit</h1><p>{about}</p>{''.join(parts)}", encoding="utf-8")
    return height + GAP_PX


def photograph(page: Path, picture: Path, height: int) -> bool:
    """False where there is no chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        return False
    size = f"--window-size={WIDTH_PX + 2 * GAP_PX},{height}"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    command = [chromium, *flags, size, f"--screenshot={picture.resolve()}", page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return True


def _laid_out(charts: Sequence[Chart]) -> tuple[str, int]:
    x, y, height, parts = 0, 0, 0, []
    for chart in charts:
        if x + chart.width + GAP_PX > WIDTH_PX:
            x, y = 0, y + height
        parts.append(draw(chart, x, y))
        x, height = x + chart.width + GAP_PX, chart.height + GAP_PX
    return "".join(parts), y + height


def _chart(panel: Panel, answers: Sequence[tuple[Query, list[Series]]], start: float, end: float) -> Chart:
    lines = {
        _legend(query.legend, one.labels): [(at - start, value) for at, value in one.points]
        for query, series in answers
        for one in series
        if one.points
    }
    width, height = panel.width * COLUMN_PX - GAP_PX, HEIGHT_PX[panel.kind]
    return Chart(panel.title, panel.kind, panel.unit, lines, end - start, panel.top, width, height)


def _legend(template: str, labels: Mapping[str, str]) -> str:
    for name, value in labels.items():
        template = template.replace(f"{{{{{name}}}}}", value)
    return template
