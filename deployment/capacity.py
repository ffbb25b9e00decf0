"""How many replicas a load takes: `snugfit plan MODEL --json | python -m deployment.capacity - --rate 4 …`.

The plan says what fits; the card's speeds and the load say how long a step takes and how many requests are in
it; docs/scaling.md has the formulas and an example. Arithmetic only: a speed that nobody measured is a guess.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.engine.scheduler import MIXED_TOKENS

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
MOST_REPLICAS = 1_000
LATE = 0.01  # the share of requests that may miss the TTFT target
FULL = 0.999  # of what a replica can do: beyond it no queue has an end that is worth a number


class OutOfReach(ValueError):
    """No number of such replicas meets the targets; the message says which one fails, and by how much."""


@dataclass(frozen=True)
class Fit:
    """What the plan of one replica says."""

    resident_bytes: int  # weights on the device, read at every step
    offloaded_bytes: int  # weights copied in at every step
    parameters: int
    kv_bytes_per_token: int
    block_tokens: int
    blocks: int  # of the KV pool
    rows: int  # requests in one step, at most
    chunk_tokens: int
    context: int  # tokens of one request, at most
    device_bytes: int  # planned peak of all cards together, or of RAM where there is none

    @classmethod
    def of(cls, plan: Mapping[str, Any]) -> Fit:
        """From the JSON of `snugfit plan --json`. Raises OutOfReach for a plan that does not fit."""
        if not plan["fits"]:
            raise OutOfReach(f"the model does not fit: {plan['hint']}")
        return cls(
            plan["resident_bytes"], plan["offloaded_bytes"],
            plan["weights_bytes"] // DTYPE_BYTES[plan["dtype"]],
            plan["kv_bytes_per_token"], plan["kv"]["block_tokens"], plan["kv"]["groups"][0]["blocks"],
            plan["concurrency"], plan["chunk_tokens"], plan["context"], _device_bytes(plan["devices"]),
        )  # fmt: skip


def _device_bytes(devices: Sequence[Mapping[str, Any]]) -> int:
    cards = [one for one in devices if one["device"].startswith("cuda")]
    return sum(one["peak_bytes"] for one in cards or devices[:1])


@dataclass(frozen=True)
class Card:
    """What one replica's device reaches: measured, or the data sheet's figure times a share."""

    read_bytes_per_second: float  # of its own memory
    operations_per_second: float  # of matrix products
    copy_bytes_per_second: float = 10e9  # offloaded weights
    host_seconds: float = 0.0  # between two forwards


@dataclass(frozen=True)
class Load:
    """What clients ask for, and how long they will wait."""

    rate: float  # requests a second
    prompt_tokens: int
    output_tokens: int
    ttft_seconds: float = math.inf  # for 99 of 100
    itl_seconds: float = math.inf  # on average
    reused: float = 0.0  # share of the prompt that is still in the KV pool

    @property
    def tokens(self) -> int:
        """That a request holds in the KV pool when it ends."""
        return self.prompt_tokens + self.output_tokens

    @property
    def read_tokens(self) -> float:
        """Of its prompt, that are computed."""
        return max(1.0, self.prompt_tokens * (1 - self.reused))


def step_seconds(fit: Fit, card: Card, rows: int, kv_tokens: float, prompt_tokens: float = 0) -> float:
    """One step: `rows` tokens of answers and `prompt_tokens` of prompts, `kv_tokens` in the pool read.

    Reading and multiplying overlap, so what takes longer counts; offloaded weights and the host come on top.
    Attention's products and the logits are left out, and all weights counted as read.
    """
    reading = (fit.resident_bytes + kv_tokens * fit.kv_bytes_per_token) / card.read_bytes_per_second
    products = 2 * fit.parameters * (rows + prompt_tokens) / card.operations_per_second
    return max(reading, products) + fit.offloaded_bytes / card.copy_bytes_per_second + card.host_seconds


@dataclass(frozen=True)
class Replica:
    """One replica under a load, with `rows` requests in it."""

    fit: Fit
    card: Card
    load: Load

    def prompt_chunk(self, rows: int) -> float:
        """Prompt tokens of a step in which prompts are read beside `rows` answers."""
        return min(self.load.read_tokens, MIXED_TOKENS, max(1, self.fit.chunk_tokens - rows))

    def itl_seconds(self, rows: int) -> float:
        """Mean time between two tokens: a step, and its share of the steps that read prompts as well.

        In the time of one answer every other request ends once and another prompt is read for it.
        """
        alone, mixed = self._step(rows), self._step(rows, self.prompt_chunk(rows))
        return alone + self._mixed_steps(rows) * (mixed - alone)

    def prefill_seconds(self, rows: int) -> float:
        """From the first step that reads a prompt to its first token, beside `rows` - 1 others."""
        chunk = self.prompt_chunk(rows)
        return math.ceil(self.load.read_tokens / chunk) * self._step(rows, chunk)

    def residence_seconds(self, rows: int) -> float:
        """From the first step of a request to its last."""
        return self.prefill_seconds(rows) + (self.load.output_tokens - 1) * self.itl_seconds(rows)

    def rate(self, rows: int) -> float:
        """Requests that end in a second while `rows` are in it: Little's law."""
        return rows / self.residence_seconds(rows)

    def most_rows(self) -> tuple[int, str]:
        """(how many requests it steps together at most, what limits them). Raises OutOfReach for none."""
        limits = {
            "the KV pool": self.fit.blocks // math.ceil(self.load.tokens / self.fit.block_tokens),
            "--concurrency": self.fit.rows,
            "the ITL target": self._most(lambda rows: self.itl_seconds(rows) <= self.load.itl_seconds),
            "reading prompts": max(1, self._most(lambda rows: self._mixed_steps(rows) <= 1)),
        }
        what = min(limits, key=lambda name: limits[name])
        if self.load.tokens > self.fit.context:
            raise OutOfReach(f"a request has {self.load.tokens} tokens and the context is {self.fit.context}")
        if not limits["the KV pool"]:
            held = self.fit.blocks * self.fit.block_tokens
            raise OutOfReach(f"a request has {self.load.tokens} tokens and the KV pool {held}")
        if not limits[what]:
            alone, target = 1e3 * self.itl_seconds(1), 1e3 * self.load.itl_seconds
            raise OutOfReach(
                f"a request alone has {alone:.0f} ms between tokens, and the target is {target:.0f} ms"
            )
        return limits[what], what

    def _most(self, keeps: Callable[[int], bool]) -> int:
        """The last number of rows that keeps to a limit; with more rows everything only takes longer."""
        over = (rows for rows in range(1, self.fit.rows + 1) if not keeps(rows))
        return next(over, self.fit.rows + 1) - 1

    def _mixed_steps(self, rows: int) -> float:
        """Share of the steps that read prompts, while each request that ends is followed by another."""
        return rows / self.load.output_tokens * self.load.read_tokens / self.prompt_chunk(rows)

    def _step(self, rows: int, prompt_tokens: float = 0) -> float:
        held = rows * (self.load.prompt_tokens + self.load.output_tokens / 2)
        return step_seconds(self.fit, self.card, rows, held, prompt_tokens)


@dataclass(frozen=True)
class Service:
    """What clients of one replica see on average, at a share of the load."""

    rows: float  # requests that run
    waiting: float
    itl_seconds: float
    ttft_seconds: float  # median
    ttft_p99_seconds: float
    busy: float  # of what it can do


def under(replica: Replica, rate: float, rows: int) -> Service | None:
    """A replica with `rows` places and `rate` requests a second that arrive at random; None: too many.

    A chain of states, n requests in each: they arrive at `rate` and leave at replica.rate(min(n, rows)).
    Random lengths are assumed in it. With constant ones a queue is about half as long.
    """
    most = replica.rate(rows)
    if rate >= FULL * most:
        return None
    weights = [1.0]
    for n in range(1, rows + 1):
        weights.append(weights[-1] * rate / replica.rate(n))
    left = rate / most  # each further one that waits is less likely by this
    full = weights[rows] / (1 - left)  # all places are taken, and any number waits
    whole = sum(weights[:rows]) + full
    running = (sum(n * weights[n] for n in range(rows)) + rows * full) / whole
    waits = full / whole
    near = max(1, round(running))
    itl, prefill = replica.itl_seconds(near), replica.prefill_seconds(near)
    return Service(
        rows=running,
        waiting=waits * left / (1 - left),
        itl_seconds=itl,
        ttft_seconds=_wait(waits, most - rate, 0.5) + itl / 2 + prefill,  # it arrives amid a step
        ttft_p99_seconds=_wait(waits, most - rate, LATE) + itl + prefill * (1 + _ahead(rate * prefill)),
        busy=left,
    )


def _wait(waits: float, spare_rate: float, beyond: float) -> float:
    """The wait that a share `beyond` of the requests exceeds; `waits` is the share that waits at all."""
    return math.log(waits / beyond) / spare_rate if waits > beyond else 0.0


def _ahead(reading: float) -> int:
    """How many prompts one in a hundred finds before its own; `reading`: the share of the time that reads."""
    return math.floor(math.log(LATE) / math.log(min(reading, 0.99)))


@dataclass(frozen=True)
class Answer:
    """How many replicas, and what each of them sees while none is missing."""

    replicas: int
    rows: int
    limited_by: str
    most_per_second: float  # requests that one replica can end
    service: Service


def replicas_for(replica: Replica, spare: int = 0) -> Answer:
    """The fewest that meet the targets when a proxy spreads requests at random; `spare` more may be missing.

    Raises OutOfReach when one request alone does not meet them.
    """
    load = replica.load
    rows, limited_by = replica.most_rows()
    if replica.prefill_seconds(1) > load.ttft_seconds:
        takes, target = replica.prefill_seconds(1), load.ttft_seconds
        raise OutOfReach(f"the prompt alone takes {takes:.2f} s, and the target is {target:.2f} s")
    for count in range(1, MOST_REPLICAS + 1):
        alone, whole = (under(replica, load.rate / each, rows) for each in (count, count + spare))
        if alone and whole and alone.ttft_p99_seconds <= load.ttft_seconds:
            return Answer(count + spare, rows, limited_by, replica.rate(rows), whole)
    raise OutOfReach(f"not even {MOST_REPLICAS} replicas keep the TTFT within {load.ttft_seconds:.2f} s")


def as_json(replica: Replica, answer: Answer, price_per_hour: float) -> dict[str, Any]:
    """Everything with its unit in its name."""
    service, load = answer.service, replica.load
    an_hour = answer.replicas * price_per_hour
    return {
        "replicas": answer.replicas,
        "rows_per_replica": answer.rows,
        "limited_by": answer.limited_by,
        "most_requests_per_second_per_replica": round(answer.most_per_second, 3),
        "busy": round(service.busy, 3),
        "running_per_replica": round(service.rows, 2),
        "waiting_per_replica": round(service.waiting, 3),
        "itl_ms": round(1e3 * service.itl_seconds, 1),
        "ttft_ms": {"p50": round(1e3 * service.ttft_seconds), "p99": round(1e3 * service.ttft_p99_seconds)},
        "device_bytes": answer.replicas * replica.fit.device_bytes,
        "cost_per_hour": round(an_hour, 2),
        "cost_per_million_output_tokens": round(an_hour / (3600 * load.rate * load.output_tokens) * 1e6, 2),
    }


def main() -> None:
    arguments = _parser().parse_args()
    text = sys.stdin.read() if str(arguments.plan) == "-" else arguments.plan.read_text()
    card = Card(arguments.read * 1e9, arguments.tflops * 1e12, arguments.copy * 1e9, arguments.host_ms / 1e3)
    load = Load(
        arguments.rate, arguments.prompt, arguments.output, arguments.ttft, arguments.itl, arguments.reused
    )
    try:
        replica = Replica(Fit.of(json.loads(text)), card, load)
        answer = replicas_for(replica, arguments.spare)
    except OutOfReach as err:
        raise SystemExit(f"capacity: {err}") from None
    print(json.dumps(as_json(replica, answer, arguments.price), indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployment.capacity", description=__doc__)
    parser.add_argument("plan", type=Path, help="what `snugfit plan --json` printed; -: on stdin")
    parser.add_argument(
        "--rate", type=float, required=True, help="requests a second, of all clients together"
    )
    parser.add_argument("--prompt", type=int, required=True, help="tokens, mean")
    parser.add_argument("--output", type=int, required=True, help="tokens, mean")
    parser.add_argument("--ttft", type=float, default=math.inf, help="seconds that 99 of 100 may wait")
    parser.add_argument("--itl", type=float, default=math.inf, help="seconds between tokens, mean")
    parser.add_argument("--reused", type=float, default=0.0, help="share of prompts found in the KV pool")
    parser.add_argument("--read", type=float, required=True, help="GB/s that the card reads its memory with")
    parser.add_argument("--tflops", type=float, required=True, help="TFLOP/s of its matrix products")
    parser.add_argument("--copy", type=float, default=10.0, help="GB/s of offloaded weights")
    parser.add_argument("--host-ms", type=float, default=0.0, help="between two steps")
    parser.add_argument("--price", type=float, default=0.0, help="of one replica's cards for an hour")
    parser.add_argument("--spare", type=int, default=0, help="replicas that may be missing: 1 for a rollout")
    return parser


if __name__ == "__main__":
    main()
