"""Many clients, many of which leave: python -m benchmarks.soak [MODEL] [--requests 10000] [--clients 64].

Asks `snugfit serve` (the built-in model, or MODEL) for short answers of random lengths, streamed and whole. A
share of the clients hangs up at a random moment: before the first token, or in the middle of the text. The
prediction: whoever stays gets a whole answer; at the end no request runs or waits and no KV block is in use;
threads, open files and resident memory are nearly what they were after the first tenth. Exit code 1 when not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.client import connect, letters
from benchmarks.server import BUILT_IN, Server

SETTLE_SECONDS = 30
LONGEST_PROMPT, LONGEST_ANSWER = 120, 24
MOST_GROWTH_BYTES = 32 << 20  # of resident memory: what the allocator keeps differs by that much
MOST_NEW_THREADS = 4  # thread pools start a thread when all of theirs are busy; a leak would be thousands
IDLE = ("snugfit_requests_running", "snugfit_requests_waiting", "snugfit_kv_cache_used_blocks")

GOOD = ("answered", "left", "answered before it left")


@dataclass(frozen=True)
class Held:
    """What the server's process holds while nobody asks for anything."""

    threads: int
    files: int  # sockets included
    resident_bytes: int


@dataclass(frozen=True)
class Visit:
    """One request, drawn beforehand so that a run can be repeated."""

    body: dict[str, Any]
    leaves_after: int | None  # pieces of the stream; 0: before the first; None: stays
    patience: float  # seconds until a client that sees no piece leaves


def visits(server: Server, arguments: argparse.Namespace) -> Iterator[Visit]:
    rng = random.Random(arguments.seed)
    for number in range(arguments.requests):
        max_tokens = rng.randint(1, LONGEST_ANSWER)
        body = server.body(letters(rng, rng.randint(1, LONGEST_PROMPT)), max_tokens)
        body |= {"ignore_eos": rng.random() < 0.5, "temperature": rng.choice([0, 1]), "seed": number}
        if rng.random() < 0.8:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        leaves = rng.random() < arguments.leave
        yield Visit(body, rng.randint(0, max_tokens) if leaves else None, rng.expovariate(2.0))


async def visit(client: httpx.AsyncClient, plan: Visit) -> str:
    """How it ended: "answered", "left", or what was wrong."""
    if plan.leaves_after is None:
        return await _stay(client, plan)
    try:
        async with asyncio.timeout(None if plan.leaves_after else plan.patience):
            return await _leave(client, plan)
    except TimeoutError:
        return "left"


async def _stay(client: httpx.AsyncClient, plan: Visit) -> str:
    response = await client.post("/v1/chat/completions", json=plan.body)
    if response.status_code != httpx.codes.OK:
        return f"status {response.status_code}"
    if not plan.body.get("stream"):
        answer = response.json()
        return _judge(plan, answer["choices"][0]["finish_reason"], answer["usage"])
    frames = [frame for frame in response.text.split("\n\n") if frame.startswith("data: ")]
    if frames[-1] != "data: [DONE]":
        return "no [DONE]"
    events = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
    if any("error" in event for event in events):
        return "an error in the stream"
    reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
    return _judge(plan, next(filter(None, reasons), None), events[-1]["usage"])


async def _leave(client: httpx.AsyncClient, plan: Visit) -> str:
    """Hang up after some pieces. One that is never shown so many, or asks for all at once, hears it out."""
    pieces = 0
    async with client.stream("POST", "/v1/chat/completions", json=plan.body) as response:
        if response.status_code != httpx.codes.OK:
            return f"status {response.status_code}"
        async for _ in response.aiter_bytes():
            pieces += 1
            if plan.leaves_after and pieces >= plan.leaves_after:
                return "left"
    return "answered before it left"


def _judge(plan: Visit, reason: str | None, usage: dict[str, Any]) -> str:
    tokens, most = usage["completion_tokens"], plan.body["max_tokens"]
    if reason not in ("stop", "length"):
        return f"finish_reason {reason}"
    if tokens > most or (reason == "length" and tokens != most):
        return f"{reason} after {'too many' if tokens > most else 'too few'} tokens"
    return "stopped too early" if plan.body["ignore_eos"] and reason != "length" else "answered"


async def crowd(server: Server, waiting: Iterator[Visit], count: int, clients: int) -> Counter[str]:
    """The next `count` visits, `clients` at any time."""
    ends: Counter[str] = Counter()
    left = iter(range(count))
    async with connect(server.url) as client:

        async def one() -> None:
            for _ in left:
                try:
                    ends[await visit(client, next(waiting))] += 1
                except httpx.HTTPError as err:
                    ends[type(err).__name__] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(one())
    return ends


def settled(server: Server) -> tuple[dict[str, int], Held]:
    """What the engine counts and what its process holds, when it has noticed that all have gone."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        idle = {name: server.metric(name) for name in IDLE}
        if not any(idle.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    time.sleep(1)  # sockets close a moment later
    process = psutil.Process(server.pid)
    return idle, Held(process.num_threads(), process.num_fds(), process.memory_info().rss)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=BUILT_IN, help="without it, the built-in one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--leave", type=float, default=0.3, help="share of the clients that hang up")
    parser.add_argument("--concurrency", type=int, default=16, help="as for snugfit serve")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    model = arguments.model
    print(
        f"predicted: {arguments.requests:,} requests from {arguments.clients} clients, of which "
        f"{arguments.leave:.0%} leave; every other one answered; then 0 running, 0 waiting, 0 blocks, and "
        f"against the first tenth no more files, at most {MOST_NEW_THREADS} more threads and "
        f"{MOST_GROWTH_BYTES >> 20} MiB more",
        flush=True,
    )
    first = arguments.requests // 10
    flags = ["--context", "512", "--concurrency", str(arguments.concurrency)]
    flags += ["--max-queue", str(arguments.clients), "--log-level", "warning"]
    with Server(model, arguments.device, *flags) as server:
        waiting, started = visits(server, arguments), time.perf_counter()
        ends = asyncio.run(crowd(server, waiting, first, arguments.clients))
        _, early = settled(server)
        print(f"after {first:,}: {early}, {dict(ends)}", flush=True)
        ends += asyncio.run(crowd(server, waiting, arguments.requests - first, arguments.clients))
        seconds = time.perf_counter() - started
        idle, late = settled(server)
    wrong = {end: count for end, count in ends.items() if end not in GOOD}
    grown = late.resident_bytes - early.resident_bytes
    flat = grown <= MOST_GROWTH_BYTES and late.files <= early.files
    flat &= late.threads <= early.threads + MOST_NEW_THREADS
    print(f"measured: {late}, {grown / (1 << 20):+.1f} MiB, {idle}, {dict(ends)}")
    result = {
        "benchmark": "soak",
        "model": model.name,
        "device": arguments.device,
        "requests": arguments.requests,
        "clients": arguments.clients,
        "seconds": round(seconds, 1),
        "ends": dict(ends),
        "wrong": sum(wrong.values()),
        "idle": idle,
        "after_first_tenth": asdict(early),
        "at_the_end": asdict(late),
        "flat": flat,
    }
    print(json.dumps(result))
    sys.exit(1 if wrong or any(idle.values()) or not flat else 0)


if __name__ == "__main__":
    main()
