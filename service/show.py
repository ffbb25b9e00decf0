"""The plan as a person reads it: what fills each device, what fits, what was given up.

Every line is ASCII but the bars, which are blocks where the terminal has colour and letters where it has none
(a pipe, NO_COLOR, an old code page); the legend beside them holds either way.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from loader.errors import BudgetExceeded
from loader.plan import ONE_AT_A_TIME, DevicePlan, Plan

GB = 10**9
MAX_WIDTH = 110
PICTURE_WIDTH = 92
BLOCK = "\N{FULL BLOCK}"
SHADE = "\N{LIGHT SHADE}"
# Round figures for the cost of a step: pageable RAM to a GPU over PCIe 4, and an ordinary SSD.
BYTES_PER_SECOND = {"cpu": 10 * GB, "disk": 2 * GB}
PLACE = {"cpu": "in RAM", "disk": "on disk"}
MAP_PATTERNS = 6


@dataclass(frozen=True)
class Part:
    """One thing that fills a budget: its letter in a plain bar, its colour and block in the other."""

    field: str
    letter: str
    name: str
    style: str
    block: str = BLOCK

    def mark(self, blocks: bool) -> str:
        return self.block if blocks else self.letter


PARTS = (
    Part("weights_bytes", "W", "weights", "blue"),
    Part("kv_bytes", "K", "KV cache", "green"),
    Part("activation_bytes", "A", "activations", "yellow"),
    Part("logits_bytes", "L", "logits", "magenta"),
    Part("staging_bytes", "S", "staging", "cyan"),
    Part("reserve_bytes", "R", "reserve", "red"),
)
FREE = Part("free_bytes", ".", "free", "bright_black", SHADE)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Print the plan on `console`, else on stdout."""
    console = console or Console()
    colour = console.color_system is not None and not console.no_color
    blocks = colour and console.encoding.startswith("utf")
    width = min(console.width, MAX_WIDTH)
    console.print(render(plan, width, blocks), width=width)


def print_misfit(err: BudgetExceeded, command: str, console: Console | None = None) -> None:
    """What the model needs against what there is, and a command that would work."""
    console = console or Console()
    table = _columns(left=1, right=1)
    rows = (
        ("needed", err.need_bytes),
        ("budget", err.have_bytes),
        ("smallest budget that works", err.smallest_bytes),
    )
    for name, n_bytes in rows:
        table.add_row(name, size(n_bytes))
    console.print(Text(f"Does not fit on {err.device}", style="bold red"), table)
    console.print(Text(f"\nThis would fit:\n  {command}"), soft_wrap=True)


def size(n_bytes: int) -> str:
    """Bytes for the eye, in decimal units with three digits or so: "15.23 GB", "54.2 MB", "812 B"."""
    for unit, name, digits in ((GB, "GB", 2), (10**6, "MB", 1), (10**3, "kB", 1)):
        if abs(n_bytes) >= unit:
            return f"{n_bytes / unit:,.{digits}f} {name}"
    return f"{n_bytes} B"


def render(plan: Plan, width: int, blocks: bool) -> RenderableType:
    """The whole picture, `width` columns wide."""
    blank = Text()
    parts = _title(plan), _bars(plan, width, blocks), _budget_table(plan, blocks), _facts(plan)
    return Group(*(item for part in parts for item in (part, blank)))


def _title(plan: Plan) -> Text:
    family = plan.family if plan.exact else f"{plan.family} (an estimate: this family is not in the table)"
    title = Text(plan.spec.source, style="bold")
    return title.append(
        f"  {family}, {plan.dtype}, {size(plan.weights_bytes)} of weights", style="default not bold"
    )


def _bars(plan: Plan, width: int, blocks: bool) -> Table:
    table = _columns(left=2, right=1)
    names = [device.device for device in plan.devices]
    counts = [f"{size(d.peak_bytes)} of {size(d.budget_bytes)}" for d in plan.devices]
    cells = max(10, width - max(map(len, names)) - max(map(len, counts)) - 6)
    for device, count in zip(plan.devices, counts, strict=True):
        table.add_row(device.device, _bar(device, cells, blocks), count)
    return table


def _bar(device: DevicePlan, cells: int, blocks: bool) -> Text:
    """One device's budget as `cells` columns: to each part its share, and at least one when it is there."""
    bar = Text()
    for part, count in zip((*PARTS, FREE), shares(device, cells), strict=True):
        bar.append(part.mark(blocks) * count, style=part.style)
    return bar


def shares(device: DevicePlan, cells: int) -> list[int]:
    """Columns of each part and of what is free, `cells` in all; the largest makes room for the tiny ones."""
    amounts = [getattr(device, part.field) for part in PARTS] + [max(device.free_bytes, 0)]
    whole = max(sum(amounts), 1)
    columns = [max(1, round(amount / whole * cells)) if amount else 0 for amount in amounts]
    largest = max(range(len(columns)), key=columns.__getitem__)
    columns[largest] += cells - sum(columns)
    return columns


def _budget_table(plan: Plan, blocks: bool) -> Table:
    table = _columns(left=2, right=len(plan.devices))
    table.add_row("", "", *(Text(device.device, style="bold") for device in plan.devices))
    for part in (*PARTS, FREE):
        amounts = [getattr(device, part.field) for device in plan.devices]
        if any(amounts):
            mark = Text(part.mark(blocks), style=part.style)
            table.add_row(mark, part.name, *(size(amount) if amount else "-" for amount in amounts))
    table.add_row(
        "", Text("budget", style="bold"), *(Text(size(d.budget_bytes), style="bold") for d in plan.devices)
    )
    return table


def _facts(plan: Plan) -> Table:
    table = _columns(left=2, right=0)
    for name, sentence in facts(plan):
        table.add_row(Text(name, style="bold"), Text(sentence, overflow="fold"))
    return table


def facts(plan: Plan) -> Iterator[tuple[str, str]]:
    """Everything that is not a bar, as (what, sentence); what is "" where a sentence goes on."""
    if plan.budget.origin:
        yield "budget", plan.budget.origin
    if "cpu" in plan.budget.compute:
        yield "beside it", f"{size(plan.startup_bytes)}: Python, torch and the model's class before loading"
    yield "context", f"{plan.context:,} tokens for one request"
    yield "batching", _batching(plan)
    yield "KV cache", f"{_pool(plan)}, {plan.kv_bytes_per_token:,} bytes each"
    yield "prefill", f"in chunks of {plan.chunk_tokens:,} tokens"
    yield "offloaded", _offloaded(plan)
    yield from _headed("given up", plan.given_up)
    yield from _headed("device map", short_map(plan.device_map))
    yield from _headed("note", plan.notes)


def _batching(plan: Plan) -> str:
    if plan.batching == ONE_AT_A_TIME:
        return plan.batching
    return f"{plan.batching}: up to {plan.concurrency} requests in one step"


def _pool(plan: Plan) -> str:
    """Where all tokens are that requests hold at the same time."""
    if plan.batching == ONE_AT_A_TIME:
        return f"{plan.context:,} tokens of the model's own"
    return f"{plan.kv_tokens:,} tokens, shared in blocks of {plan.kv.block_tokens}"


def _offloaded(plan: Plan) -> str:
    """Where the weights are that do not stay on the device, and what fetching them adds to every step."""
    if not plan.offloaded_bytes:
        return f"nothing: all {size(plan.weights_bytes)} of weights stay on {', '.join(plan.budget.compute)}"
    away = [d for d in plan.devices if d.device not in plan.budget.compute and d.weights_bytes]
    where = " and ".join(f"{size(d.weights_bytes)} {PLACE[d.device]}" for d in away)
    seconds = sum(d.weights_bytes / BYTES_PER_SECOND[d.device] for d in away)
    rates = " and ".join(f"{BYTES_PER_SECOND[d.device] // GB}" for d in away)
    return f"{where}: read at every step, about {seconds:.2g} s at {rates} GB/s"


def _headed(name: str, lines: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The name beside the first line only."""
    for i, line in enumerate(lines):
        yield ("" if i else name), line


def short_map(device_map: Mapping[str, int | str]) -> list[str]:
    """accelerate's device map, a line per device: "model.embed_tokens, model.layers.0-25 -> cuda:0"."""
    names: dict[str, list[str]] = {}
    for module, device in device_map.items():
        names.setdefault(f"cuda:{device}" if isinstance(device, int) else device, []).append(module)
    return [f"{_short_list(modules)} -> {device}" for device, modules in names.items()]


def _short_list(modules: Sequence[str]) -> str:
    """Modules that differ in one layer number only are written as one: "model.layers.0-3,7.mlp"."""
    layers: dict[tuple[str, str], list[int]] = {}
    for module in modules:
        before, number, after = (*re.split(r"(\d+)", module or "the whole model", maxsplit=1), "", "")[:3]
        layers.setdefault((before, after), []).extend([int(number)] if number else [])
    short = [before + _ranges(numbers) + after for (before, after), numbers in layers.items()]
    more = f", and {len(short) - MAP_PATTERNS} more" if len(short) > MAP_PATTERNS else ""
    return ", ".join(short[:MAP_PATTERNS]) + more


def _ranges(numbers: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    runs = [
        [n for _, n in run]
        for _, run in groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _columns(left: int, right: int) -> Table:
    """A table without lines: so many columns of words, then of numbers, two spaces apart."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(left):
        table.add_column()
    for _ in range(right):
        table.add_column(justify="right", no_wrap=True)
    return table


def picture(plan: Plan, command: str) -> str:
    """The plan as an SVG, under the command that printed it. No font is fetched."""
    console = Console(record=True, width=PICTURE_WIDTH, file=io.StringIO(), color_system="truecolor")
    console.print(render(plan, PICTURE_WIDTH, blocks=True))
    svg = console.export_svg(title=command, unique_id="plan")
    return re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
