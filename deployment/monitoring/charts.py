"""Line charts, single numbers and bars as SVG, as Grafana would show them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

COLORS = (
    "#1f77b4", "#e8710a", "#2ca02c", "#d62728", "#7b52ab", "#17a2b8", "#8c564b", "#c2188b", "#6b7280",
    "#9a8700", "#0b3d91", "#66bb6a",
)  # fmt: skip
LEFT, RIGHT, TOP, AXIS = 62, 12, 30, 18
LINE_PX, CHARACTER_PX, MARK_PX = 15, 6.7, 22  # of a legend
TICKS = 4
BINARY, SMALL = ("B", "KiB", "MiB", "GiB", "TiB"), ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
SUFFIXES = {"reqps": " req/s", "ops": " /s", "short": ""}


@dataclass(frozen=True)
class Chart:
    """`lines` maps a name to (seconds since the start, value) pairs; sizes are in pixels."""

    title: str
    kind: str
    unit: str
    lines: Mapping[str, Points]
    seconds: float
    top: float | None
    width: int
    height: int

    @property
    def highest(self) -> float:
        """The end of the axis."""
        highest = max((value for line in self.lines.values() for _, value in line), default=0)
        return self.top or _round_up(highest, 1024 if self.unit == "bytes" else 1000)


def draw(chart: Chart, x: int, y: int) -> str:
    """An <svg> at a place of the element it is put in."""
    body = {"stat": _number, "bargauge": _bars}.get(chart.kind, _lines)(chart)
    title = _text(12, 19, chart.title, 'font-weight="bold" font-size="12"')
    place = f'style="left:{x}px;top:{y}px" width="{chart.width}" height="{chart.height}"'
    return f'<svg {place} font-family="DejaVu Sans" font-size="11">{title}{body}</svg>'


def said(value: float, unit: str) -> str:
    """A value as Grafana's unit shows it."""
    if unit == "bytes":
        power = min(int(math.log(value, 1024)), len(BINARY) - 1) if value >= 1 else 0
        return f"{value / 1024**power:.3g} {BINARY[power]}"
    if unit == "s":
        scale, name = next((pair for pair in SMALL if value >= pair[0]), SMALL[0])
        return f"{value / scale:.3g} {name}"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}") + SUFFIXES[unit]


def _lines(chart: Chart) -> str:
    legend, height = _legend(chart)
    bottom = chart.height - height - AXIS
    parts = [_grid(chart, bottom)]
    for color, points in zip(COLORS, chart.lines.values(), strict=False):
        parts.append(_path(chart, points, (LEFT, chart.width - RIGHT), (bottom, TOP), color))
    return "".join(parts) + legend


def _grid(chart: Chart, bottom: int) -> str:
    parts, right = [], chart.width - RIGHT
    for tick in range(TICKS + 1):
        share = tick / TICKS
        y, x = bottom - share * (bottom - TOP), LEFT + share * (right - LEFT)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        value = said(share * chart.highest, chart.unit)
        parts.append(_text(LEFT - 6, y + 4, value, 'text-anchor="end" fill="#57606a" font-size="10"'))
        anchor = "end" if tick == TICKS else "middle"
        seconds = f"{share * chart.seconds:.0f} s"
        parts.append(_text(x, bottom + 14, seconds, f'text-anchor="{anchor}" fill="#57606a" font-size="10"'))
    return "".join(parts)


def _path(
    chart: Chart, points: Points, across: tuple[float, float], up: tuple[float, float], color: str
) -> str:
    """`across` and `up` are where the axes begin and end."""
    places = [
        f"{across[0] + at / chart.seconds * (across[1] - across[0]):.1f},"
        f"{up[0] + min(value / chart.highest, 1) * (up[1] - up[0]):.1f}"
        for at, value in points
    ]
    return f'<polyline points="{" ".join(places)}" fill="none" stroke="{color}" stroke-width="1.6"/>'


def _legend(chart: Chart) -> tuple[str, int]:
    """Names in as many lines as they take, at the bottom, and their height."""
    places, x, line = [], 10.0, 0
    for name in chart.lines:
        width = MARK_PX + CHARACTER_PX * len(name) + 10
        if x + width > chart.width and x > 10:
            x, line = 10.0, line + 1
        places.append((name, x, line))
        x += width
    height = (line + 1) * LINE_PX + 8
    parts = []
    for color, (name, x, line) in zip(COLORS, places, strict=False):
        y = chart.height - height + 12 + line * LINE_PX
        parts.append(f'<rect x="{x:.0f}" y="{y - 5}" width="14" height="3" fill="{color}"/>')
        parts.append(_text(x + MARK_PX - 4, y, name, ""))
    return "".join(parts), height


def _number(chart: Chart) -> str:
    """The latest of each line, and the first line's course."""
    latest = [(name, points[-1][1]) for name, points in chart.lines.items()]
    words = " of ".join(said(value, chart.unit) for _, value in latest) or "no data"
    parts = [_text(chart.width / 2, 58, words, 'text-anchor="middle" font-size="24" fill="#1a7f37"')]
    for points in list(chart.lines.values())[:1]:
        parts.append(_path(chart, points, (0, chart.width), (chart.height - 3, 68), "#8cc69a"))
    return "".join(parts)


def _bars(chart: Chart) -> str:
    parts, room = [], chart.width - 330
    for n, (name, points) in enumerate(chart.lines.items()):
        y, value = 36 + 27 * n, points[-1][1]
        parts.append(_text(12, y + 14, name, ""))
        width = max(1.0, room * value / chart.highest)
        parts.append(f'<rect x="240" y="{y}" width="{width:.1f}" height="19" fill="#1f77b4"/>')
        parts.append(_text(248 + width, y + 14, said(value, chart.unit), ""))
    return "".join(parts)


def _round_up(value: float, base: int) -> float:
    """The next number of few digits, in units that are powers of `base`."""
    if value <= 0:
        return 1.0
    unit = float(base) ** math.floor(math.log(value, base))
    count = value / unit
    ten = 10.0 ** math.floor(math.log10(count))
    return unit * ten * next(step for step in (1, 2, 3, 4, 6, 8, 10) if count <= step * ten * 1.0001)


def _text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'
