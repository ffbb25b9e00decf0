"""A rolling restart under load: python -m benchmarks.rolling [--ways told-nginx …] [--clients 8].

Two replicas of `snugfit serve` (the built-in model, a thread each) stand behind a real proxy. Clients ask all
the time through the OpenAI SDK, which tries nothing again; every other answer is streamed. Then each replica
in turn is stopped and started as Kubernetes does it with maxSurge 0. How the proxy learns of it:

told-…       the replica leaves the proxy's list, and gets SIGTERM --delay seconds later: a Pod's end with a
             preStop delay
readiness-…  SIGTERM at once and nobody says a word: HAProxy asks for /ready, nginx sees the refusals
-once        the proxy does not ask another replica when one refuses
-tcp         the proxy knows connections and no requests, as kube-proxy

The new one has another address, as a new Pod has, and enters the list when it is ready.
The prediction is 0 failed requests for the ways in MUST; the others show what is at stake.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from benchmarks.client import quantile
from benchmarks.proxy import Haproxy, Nginx, NotInstalled, Proxy
from benchmarks.replica import Replica
from benchmarks.server import BUILT_IN

NAME = "snugfit-demo"
CLIENT_SECONDS = 60
MUST = ("told-nginx", "told-haproxy-once", "told-tcp", "readiness-nginx", "readiness-haproxy")
Start = Callable[[], Replica]
Open = Callable[[Path, Sequence[int]], Any]  # a context manager that gives a Proxy

WAYS: dict[str, Open] = {
    "told-nginx": Nginx,
    "told-haproxy-once": lambda folder, ports: Haproxy(folder, ports, checks=False, retry=False),
    "told-tcp": lambda folder, ports: Haproxy(folder, ports, checks=False, mode="tcp"),
    "readiness-nginx": Nginx,
    "readiness-haproxy": Haproxy,
    "readiness-haproxy-once": lambda folder, ports: Haproxy(folder, ports, retry=False),
    "readiness-tcp": lambda folder, ports: Haproxy(folder, ports, mode="tcp"),
}


@dataclass(frozen=True)
class Asked:
    """One request; times in seconds."""

    began: float
    took: float
    first: float | None  # to the first text of a stream
    wrong: str | None  # how it failed


@dataclass
class Crowd:
    """Clients that ask one question after the other until `stop` is called."""

    url: str
    model: str
    clients: int
    asked: list[Asked] = field(default_factory=list)
    _stopped: bool = False

    def stop(self) -> None:
        self._stopped = True

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(self.clients):
                group.create_task(self._client(random.Random(number)))

    async def _client(self, rng: random.Random) -> None:
        async with openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=CLIENT_SECONDS
        ) as client:
            streams = False
            while not self._stopped:
                streams = not streams
                self.asked.append(await ask(client, self.model, rng, streams))
                await asyncio.sleep(rng.uniform(0, 0.2))


async def ask(client: openai.AsyncOpenAI, model: str, rng: random.Random, streams: bool) -> Asked:
    tokens, began, first = rng.randint(4, 40), time.monotonic(), None
    wrong: str | None = None
    try:
        answer = await client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": f"What is {rng.randint(0, 99)} plus one?"}],
            max_tokens=tokens,
            stream=streams,
            extra_body={"ignore_eos": True},
        )
        if isinstance(answer, openai.AsyncStream):
            first, reason = await _listen(answer)
        else:
            reason = answer.choices[0].finish_reason
        wrong = None if reason == "length" else f"finish_reason {reason}"
    except openai.APIStatusError as err:
        wrong = f"status {err.status_code} {err.code}"
    except openai.APIError as err:
        wrong = f"{type(err).__name__}: {err.__cause__ or err}"
    ended = time.monotonic()
    return Asked(began, ended - began, first - began if first else None, wrong)


async def _listen(stream: Any) -> tuple[float | None, str | None]:
    """(when the first text came, the finish_reason)."""
    first = reason = None
    async for chunk in stream:
        for choice in chunk.choices:
            first = first or (time.monotonic() if choice.delta.content else None)
            reason = choice.finish_reason or reason
    return first, reason


@contextmanager
def replicas(start: Start, count: int) -> Iterator[list[Replica]]:
    """So many that are ready. The list may be changed: what is in it at the end is stopped."""
    running: list[Replica] = []
    try:
        for _ in range(count):
            running.append(start())
        for replica in running:
            replica.wait_until_ready()
        yield running
    finally:
        for replica in running:
            replica.kill()


def replace(running: list[Replica], place: int, start: Start, proxy: Proxy, delay: float | None) -> float:
    """As a Deployment with maxSurge 0: out of the endpoints, preStop delay, SIGTERM, a new one, ready, in.
    Without a delay it is not taken out. Returns the seconds from SIGTERM to the end of the process."""
    old = running[place]
    if delay is not None:
        proxy.tell([other.port for other in running if other is not old])
        time.sleep(delay)
    stopped = old.terminate()
    running[place] = start()
    running[place].wait_until_ready()
    proxy.tell([replica.port for replica in running])
    return stopped


async def under_load(crowd: Crowd, roll: Callable[[], float], count: int, calm: float) -> list[float]:
    """Roll `count` times while the crowd asks, with `calm` seconds before, between and after."""
    asking = asyncio.create_task(crowd.run())
    stopped = []
    for _ in range(count):
        await asyncio.sleep(calm)
        stopped.append(await asyncio.to_thread(roll))
    await asyncio.sleep(calm)
    crowd.stop()
    await asking
    return stopped


def measure(
    way: str, start: Start, folder: Path, clients: int, delay: float, calm: float, model: str = NAME
) -> dict[str, Any]:
    """One rolling restart of two replicas. Raises NotInstalled."""
    with ExitStack() as opened:
        running = opened.enter_context(replicas(start, 2))
        proxy = opened.enter_context(WAYS[way](folder, [replica.port for replica in running]))
        crowd, places = Crowd(proxy.url, model, clients), iter(range(len(running)))
        notice = delay if way.startswith("told") else None

        def roll() -> float:
            return replace(running, next(places), start, proxy, notice)

        stopped = asyncio.run(under_load(crowd, roll, len(running), calm))
    return row(way, crowd.asked, stopped)


def row(way: str, asked: list[Asked], stopped: list[float]) -> dict[str, Any]:
    firsts = [one.first for one in asked if one.first is not None]
    wrong = Counter(one.wrong for one in asked if one.wrong)
    return {
        "way": way,
        "requests": len(asked),
        "streamed": len(firsts),
        "failed": wrong.total(),
        "failures": dict(wrong),
        "ttft_ms": {
            "p50": ms(quantile(firsts, 0.5)),
            "p99": ms(quantile(firsts, 0.99)),
            "max": ms(max(firsts)),
        },
        "answer_ms_max": ms(max(one.took for one in asked)),
        "seconds": round(max(one.began + one.took for one in asked) - asked[0].began, 1),
        "stopped_after_seconds": [round(seconds, 2) for seconds in stopped],
    }


def holds(ways: Sequence[str], rows: Sequence[dict[str, Any]]) -> bool:
    """Whether no request failed by any of these ways that is in MUST; one that was skipped does not hold."""
    failed = {row["way"]: row["failed"] for row in rows}
    return all(failed.get(way) == 0 for way in ways if way in MUST)


def ms(seconds: float) -> int:
    return round(1e3 * seconds)


def built_in(log: Path, threads: int = 1) -> Start:
    """Starts `snugfit serve` with the built-in model."""

    def start() -> Replica:
        flags = ["--device", "cpu", "--threads", str(threads), "--port", "0", "--log-level", "warning"]
        return Replica(["-m", "service", "serve", str(BUILT_IN), "--served-model-name", NAME, *flags], log)

    return start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--delay", type=float, default=3.0, help="preStop, seconds")
    parser.add_argument("--calm", type=float, default=3.0, help="seconds before, between and after")
    arguments = parser.parse_args()
    print(f"predicted: two restarts, 0 failed requests by each of: {', '.join(MUST)}", flush=True)
    rows = []
    for way in arguments.ways:
        with tempfile.TemporaryDirectory() as folder:
            start = built_in(Path(folder) / "replicas.log")
            try:
                rows.append(
                    measure(way, start, Path(folder), arguments.clients, arguments.delay, arguments.calm)
                )
            except NotInstalled as reason:
                print(f"skipped {way}: {reason}", flush=True)
                continue
        print(f"measured: {json.dumps(rows[-1])}", flush=True)
    names = ("clients", "delay", "calm")
    given = {name: getattr(arguments, name) for name in names}
    print(json.dumps({"benchmark": "rolling", "model": BUILT_IN.name, **given, "rows": rows}))
    sys.exit(not holds(arguments.ways, rows))


if __name__ == "__main__":
    main()
