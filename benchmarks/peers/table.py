"""Medians over the rounds, ratios taken round by round, and the table of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.peers.cases import Numbers

US = "snugfit"
FASTER_WHEN_HIGH = ("decode_tokens_per_second", "batch_tokens_per_second")
FASTER_WHEN_LOW = ("long_ttft_ms",)
HEAD = (
    "server | 1 request: tok/s | ITL ms | of limit | {streams} requests: tok/s | TTFT ms | ITL ms | of limit",
    "TTFT of {long:,} tokens, ms | of limit | 2nd turn",
)
# Columns of numbers, in the order of the head, and how they are shown.
COLUMNS = {
    "decode_tokens_per_second": ".1f",
    "decode_itl_ms": ".1f",
    "decode_share": ".0%",
    "batch_tokens_per_second": ".1f",
    "batch_ttft_ms": ",.0f",
    "batch_itl_ms": ".1f",
    "batch_share": ".0%",
    "long_ttft_ms": ",.0f",
    "long_share": ".0%",
    "second_turn_share": ".0%",
}


@dataclass
class Results:
    """What was measured of each peer in each round; a round without it is None."""

    rounds: dict[str, list[Numbers | None]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # why a peer has no numbers, or no more of them

    def values(self, peer: str, key: str) -> list[float]:
        return [numbers[key] for numbers in self.rounds.get(peer, []) if numbers and key in numbers]

    def median(self, peer: str, key: str) -> float | None:
        values = self.values(peer, key)
        return median(values) if values else None

    def ratio(self, peer: str, key: str) -> float | None:
        """How many times faster we are than the peer: the median of the rounds that both have."""
        pairs = [
            (ours[key], theirs[key])
            for ours, theirs in zip(self.rounds.get(US, []), self.rounds.get(peer, []), strict=False)
            if ours and theirs and key in ours and key in theirs
        ]
        ratios = [theirs / ours if key in FASTER_WHEN_LOW else ours / theirs for ours, theirs in pairs]
        return median(ratios) if ratios else None

    def row(self, peer: str) -> dict[str, Any]:
        keys = sorted({key for numbers in self.rounds.get(peer, []) if numbers for key in numbers})
        found: dict[str, Any] = {key: _rounded(self.median(peer, key)) for key in keys}
        found["rounds"] = {key: [_rounded(value) for value in self.values(peer, key)] for key in keys}
        if peer != US:
            ratios = {key: self.ratio(peer, key) for key in (*FASTER_WHEN_HIGH, *FASTER_WHEN_LOW)}
            found["snugfit_is_faster"] = {key: _rounded(value) for key, value in ratios.items()}
        return found

    def table(self, peers: Sequence[str], streams: int, long_prompt: int) -> str:
        head = " | ".join(HEAD).format(streams=streams, long=long_prompt).split(" | ")
        shown = [peer for peer in peers if self.rounds.get(peer)]
        rows = [head, ["---"] * len(head)]
        rows += [self._numbers(peer) for peer in shown]
        rows += [self._ratios(peer) for peer in shown if peer != US and US in shown]
        rows += [[peer, reason] for peer, reason in self.failed.items()]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _numbers(self, peer: str) -> list[str]:
        return [peer, *(_cell(self.median(peer, key), form) for key, form in COLUMNS.items())]

    def _ratios(self, peer: str) -> list[str]:
        compared = (*FASTER_WHEN_HIGH, *FASTER_WHEN_LOW)
        cells = (_cell(self.ratio(peer, key), ".2f", "x") if key in compared else "" for key in COLUMNS)
        return [f"{US} : {peer}", *cells]


def _cell(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def summary(results: Results, peers: Sequence[str]) -> dict[str, Any]:
    rows = {peer: results.row(peer) for peer in peers}
    for peer, reason in results.failed.items():
        rows[peer]["failed"] = reason
    return rows
