"""One to four replicas behind a real proxy: python -m benchmarks.scaling [PLAN.json] [--parts load real]

load   The same load on 1, 2, 3 and 4 replicas, spread at random as a Service does. Requests arrive at random
       moments whatever became of those before. Replicas are benchmarks.paced: all of the service is real, but
       the forward only takes the time that deployment.capacity gives a step on a card. So what is compared
       with the prediction is queues, batching, HTTP and proxy; the card's speed is an assumption of both.
real   The built-in model on this machine's cores, which all replicas share.

Without PLAN.json: that of a 7B in bf16 on a card of 24 GB, from headers alone.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.client import Sample, ask, connect, letters, quantile, together
from benchmarks.paced import GPU, MODEL, add_card, body, card_of, paced, plan_for
from benchmarks.proxy import Nginx
from benchmarks.replica import Replica
from benchmarks.rolling import NAME as DEMO
from benchmarks.rolling import built_in, ms, replicas
from deployment.capacity import Fit, Load, under
from deployment.capacity import Replica as Modelled

TEMPLATE_TOKENS = 19  # that the paced model's template writes around one question


@dataclass
class Watch:
    """What the replicas have to do, once a second."""

    running: list[Replica]
    waiting: list[float] = field(default_factory=list)  # requests, of each replica at each look
    stepping: list[float] = field(default_factory=list)

    async def run(self) -> None:
        while True:
            await asyncio.to_thread(self._look)
            await asyncio.sleep(1)

    def _look(self) -> None:
        for replica in self.running:
            self.waiting.append(replica.metric("snugfit_requests_waiting"))
            self.stepping.append(replica.metric("snugfit_requests_running"))


@dataclass(frozen=True)
class Arrival:
    at: float  # seconds after the start
    body: dict[str, Any]


def arrivals(load: Load, seconds: float, seed: int) -> Iterator[Arrival]:
    """At random moments; answers of half to one and a half times the mean."""
    rng, at = random.Random(seed), 0.0
    while (at := at + rng.expovariate(load.rate)) < seconds:
        tokens = rng.randint(load.output_tokens // 2, load.output_tokens * 3 // 2)
        yield Arrival(at, body(letters(rng, load.prompt_tokens - TEMPLATE_TOKENS), tokens))


@dataclass(frozen=True)
class Outcome:
    arrived: float
    sample: Sample | None  # None: turned away with 429
    ended: float
    tokens: int


async def offer(url: str, load: Load, warm: float, window: float, watch: Watch) -> list[Outcome]:
    """Every request that arrives in warm + window seconds, to its end."""
    outcomes: list[Outcome] = []
    started = time.perf_counter()
    async with connect(url) as client:

        async def one(arrival: Arrival) -> None:
            sample = None
            try:
                sample = await ask(client, arrival.body)
            except httpx.HTTPStatusError as err:
                if err.response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                    raise
            ended, tokens = time.perf_counter() - started, arrival.body["max_tokens"]
            outcomes.append(Outcome(arrival.at, sample, ended, tokens))

        async with asyncio.TaskGroup() as group:
            watching: asyncio.Task[None] | None = None
            for arrival in arrivals(load, warm + window, seed=1):
                await asyncio.sleep(started + arrival.at - time.perf_counter())
                if watching is None and arrival.at >= warm:
                    watching = asyncio.create_task(watch.run())
                group.create_task(one(arrival))
            if watching:
                watching.cancel()
    return outcomes


@contextmanager
def cpu_share(running: list[Replica], proxy_pid: int) -> Iterator[list[float]]:
    """Of all cores, while the block runs: replicas, proxy and this client."""
    found: list[float] = []

    def used() -> float:
        seen = [psutil.Process(proxy_pid), *psutil.Process(proxy_pid).children(), psutil.Process()]
        times = [process.cpu_times() for process in seen]
        return sum(t.user + t.system for t in times) + sum(replica.cpu_seconds() for replica in running)

    began, before = time.monotonic(), used()
    yield found
    found.append((used() - before) / (time.monotonic() - began) / (os.cpu_count() or 1))


def load_row(
    count: int, outcomes: list[Outcome], warm: float, window: float, watch: Watch, cpu: float
) -> dict[str, Any]:
    inside = [one for one in outcomes if one.arrived >= warm]
    samples = [one.sample for one in inside if one.sample]
    ended = [one for one in outcomes if one.sample and warm <= one.ended < warm + window]
    firsts = [sample.first for sample in samples]
    gaps = [sample.decode_seconds / len(sample.gaps) for sample in samples if sample.gaps]
    return {
        "replicas": count,
        "requests": len(inside),
        "turned_away": sum(one.sample is None for one in inside),
        "requests_per_second": round(len(ended) / window, 2),
        "tokens_per_second": round(sum(one.tokens for one in ended) / window),
        "ttft_ms": {"p50": ms(quantile(firsts, 0.5)), "p99": ms(quantile(firsts, 0.99))},
        "itl_ms_mean": ms(statistics.mean(gaps)),
        "waiting_per_replica": round(statistics.mean(watch.waiting), 2),
        "running_per_replica": round(statistics.mean(watch.stepping), 2),
        "cpu_share": round(cpu, 2),
    }


def predicted(modelled: Modelled, count: int, rows: int) -> dict[str, Any]:
    load, most = modelled.load, modelled.rate(rows)
    service = under(modelled, load.rate / count, rows)
    if service is None:
        return {
            "replicas": count,
            "requests_per_second": round(count * most, 2),
            "waiting_per_replica": "grows to --max-queue",
            "running_per_replica": rows,
            "itl_ms_mean": ms(modelled.itl_seconds(rows)),
        }
    return {
        "replicas": count,
        "requests_per_second": load.rate,
        "ttft_ms": {"p50": ms(service.ttft_seconds), "p99": ms(service.ttft_p99_seconds)},
        "itl_ms_mean": ms(service.itl_seconds),
        "waiting_per_replica": round(service.waiting, 2),
        "running_per_replica": round(service.rows, 2),
    }


def part_load(plan: Path, arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    fit, load = Fit.of(json.loads(plan.read_text())), load_of(arguments)
    modelled, rows = Modelled(fit, card_of(arguments), load), []
    for count in arguments.replicas:
        guess = predicted(modelled, count, fit.rows)
        print(f"predicted: {json.dumps(guess)}", flush=True)
        with ExitStack() as opened:
            running = opened.enter_context(replicas(paced(plan, arguments, folder / "log"), count))
            proxy = opened.enter_context(Nginx(folder, [replica.port for replica in running], "random"))
            watch = Watch(running)
            with cpu_share(running, proxy.pid) as cpu:
                work = offer(proxy.url, load, arguments.warm, arguments.window, watch)
                outcomes = asyncio.run(work)
            measured = load_row(count, outcomes, arguments.warm, arguments.window, watch, cpu[0])
        print(f"measured:  {json.dumps(measured)}", flush=True)
        rows.append({"predicted": guess, "measured": measured})
    return rows


def part_real(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    cores, rows = os.cpu_count() or 1, []
    print(f"predicted: {cores} cores are the limit, so no more tokens/s with more replicas", flush=True)
    for count in arguments.replicas:
        threads = max(1, cores // count)
        with ExitStack() as opened:
            start = built_in(folder / "log", threads)
            running = opened.enter_context(replicas(start, count))
            proxy = opened.enter_context(Nginx(folder, [replica.port for replica in running]))
            rng = random.Random(count)
            bodies = [body(letters(rng, 40), 64) | {"model": DEMO} for _ in range(160)]
            asyncio.run(together(proxy.url, bodies[:16], 16))  # warm
            seconds, samples = asyncio.run(together(proxy.url, bodies, 16))
        firsts = [sample.first for sample in samples]
        row = {
            "replicas": count,
            "threads_each": threads,
            "tokens_per_second": round(64 * len(samples) / seconds),
            "ttft_ms": {"p50": ms(quantile(firsts, 0.5)), "p99": ms(quantile(firsts, 0.99))},
        }
        print(f"measured:  {json.dumps(row)}", flush=True)
        rows.append(row)
    return rows


def load_of(arguments: argparse.Namespace) -> Load:
    return Load(arguments.rate, arguments.prompt, arguments.output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, nargs="?", help="what `snugfit plan --json` printed")
    parser.add_argument("--parts", nargs="+", choices=("load", "real"), default=["load", "real"])
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--rows", type=int, default=32, help="--concurrency of the plan that is made")
    parser.add_argument("--rate", type=float, default=6.0, help="requests a second")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--output", type=int, default=128, help="tokens, mean")
    parser.add_argument("--warm", type=float, default=20.0, help="seconds that are not counted")
    parser.add_argument("--window", type=float, default=60.0, help="seconds that are")
    add_card(parser)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "scaling", "model": MODEL, "gpu": GPU}
    result |= {
        name: getattr(arguments, name) for name in ("rate", "prompt", "output", "read", "tflops", "rows")
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = arguments.plan or plan_for(arguments.rows, folder)
        if "load" in arguments.parts:
            result["load"] = part_load(plan, arguments, folder)
        if "real" in arguments.parts:
            result["real"] = part_real(arguments, folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
