"""One run of a real Prometheus over real services: traffic, and every state that an alert is about.

- `real` is `snugfit serve` on the built-in model, with a KV pool and a queue that are too small for its load;
- `card` is planned for a GPU and `spare` for the CPU, both with a scripted engine (scripted.py);
- all of them have the driver's library of tests/e2e/fake_nvml.c, with two GPUs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.client import connect
from benchmarks.replica import Replica
from deployment import ROOT
from deployment.monitoring.prometheus import DEADLINE_SECONDS, Prometheus, configuration
from deployment.monitoring.scripted import CONCURRENCY, NAME
from deployment.monitoring.traffic import Traffic

FAKE_DRIVER = ROOT / "tests" / "e2e" / "fake_nvml.c"
# The pool holds 992 tokens for eight requests of up to 512 each.
TOO_SMALL = (
    "--device", "cpu", "--budget", "54MB", "--context", "512", "--concurrency", "8", "--max-queue", "12",
    "--max-wait-seconds", "2", "--port", "0",
)  # fmt: skip
MODEL = "snugfit-demo"  # the built-in one
SCRIPTED = "deployment.monitoring.scripted"
SETTLE_SECONDS = 4  # some scrapes
USED_BYTES = 4_300_000_000
ASKED = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}]}


@dataclass(frozen=True)
class Run:
    """What is left to ask. Times are seconds since the epoch; traffic ended at `calm`, then things broke."""

    prometheus: Prometheus
    configuration: Path
    exposed: dict[str, str]  # /metrics of each service in the midst of it
    statuses: Counter[int]  # of the answers of `real`
    start: float
    calm: float
    end: float


def compiler() -> str | None:
    return shutil.which("gcc") or shutil.which("cc")


@contextmanager
def run(folder: Path, rules: Path, seconds: float) -> Iterator[Run]:
    """Takes `seconds` and half a minute more; Prometheus can be asked until the block ends."""
    with ExitStack() as opened:
        driver = _Driver(folder)
        services = {name: opened.enter_context(one) for name, one in _services(folder, driver)}
        services["real"].wait_until_ready()
        config = folder / "prometheus.yml"
        addresses = {name: one.url.removeprefix("http://") for name, one in services.items()}
        config.write_text(configuration(rules, addresses))
        scene = _Scene(opened, Prometheus(config, folder / "data"), driver, **services)
        yield asyncio.run(scene.play(config, seconds))


class _Driver:
    """The fake library, and the bytes that it says are in use on its second GPU."""

    def __init__(self, folder: Path) -> None:
        program = compiler()
        assert program, "the caller has looked"
        self._used = folder / "used"
        self.set(USED_BYTES)
        library = folder / "libnvidia-ml.so.1"
        flags = ["-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
        subprocess.run([program, *flags, "-o", str(library), str(FAKE_DRIVER)], check=True)
        self.environment = {
            "LD_LIBRARY_PATH": str(folder), "FAKE_NVML_USED": str(self._used), "FAKE_NVML_PROC": "self",
        }  # fmt: skip

    def set(self, n_bytes: int) -> None:
        """At once: half a number would be a lost GPU."""
        fresh = self._used.with_suffix(".new")
        fresh.write_text(str(n_bytes))
        fresh.replace(self._used)

    def lose(self) -> None:
        self._used.unlink()


def _services(folder: Path, driver: _Driver) -> Iterator[tuple[str, Replica]]:
    first, second, none = ({**driver.environment, "CUDA_VISIBLE_DEVICES": gpu} for gpu in ("0", "1", ""))
    first["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    yield "real", Replica(("-m", "service", "serve", *TOO_SMALL), folder / "real.log", first)
    card = ("-m", SCRIPTED, "--gpu", "16GiB", "--budget", "7GB")
    yield "card", Replica(card, folder / "card.log", second)
    yield "spare", Replica(("-m", SCRIPTED, "--budget", "120MB"), folder / "spare.log", none)


@dataclass
class _Scene:
    opened: ExitStack
    prometheus: Prometheus  # not started
    driver: _Driver
    real: Replica
    card: Replica
    spare: Replica

    async def play(self, config: Path, seconds: float) -> Run:
        traffic = Traffic(self.real.url, MODEL, seconds)
        async with connect(self.card.url) as client:
            held = await self._hold(client)
            await asyncio.to_thread(self.opened.enter_context, self.prometheus)
            await self._until_all_are_scraped()
            start = time.time()
            await asyncio.gather(
                traffic.run(), self._trouble_the_card(client, seconds), self._use_vram(seconds)
            )
            await asyncio.gather(*held)
        services = {"real": self.real, "card": self.card, "spare": self.spare}
        exposed = {name: one.metrics() for name, one in services.items()}
        await self._let_things_break()
        return Run(self.prometheus, config, exposed, traffic.statuses, start, start + seconds, time.time())

    async def _hold(self, client: httpx.AsyncClient) -> list[asyncio.Task[httpx.Response]]:
        """Requests that wait before Prometheus starts, so that it never sees the queue empty."""
        _tell(self.card, "load")
        self.card.wait_until_ready()
        _tell(self.card, "hold")
        held = [asyncio.create_task(_ask(client)) for _ in range(CONCURRENCY + 3)]
        queue = f'snugfit_requests_waiting{{model="{NAME}"}} 3.0'
        while queue not in await asyncio.to_thread(self.card.metrics):
            await asyncio.sleep(0.1)
        return held

    async def _until_all_are_scraped(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while missing := {"real", "card", "spare"} - self.prometheus.up():
            if time.monotonic() > deadline:
                raise SystemExit(f"Prometheus has not scraped {', '.join(missing)}")
            await asyncio.sleep(0.2)
        await asyncio.sleep(SETTLE_SECONDS)

    async def _trouble_the_card(self, client: httpx.AsyncClient, seconds: float) -> None:
        """A queue that grows, first tokens that are late, steps without memory, answers that break."""
        end = time.monotonic() + seconds
        waiting = []
        while time.monotonic() < end - seconds / 2:
            waiting.append(asyncio.create_task(_ask(client)))
            await asyncio.sleep(1)
        _tell(self.card, "release")
        await asyncio.gather(*waiting)
        _tell(self.card, "fail")
        while time.monotonic() < end:
            await _ask(client)
            _tell(self.card, "retry")
            await asyncio.sleep(0.1)

    async def _use_vram(self, seconds: float) -> None:
        for second in range(int(seconds)):
            self.driver.set(USED_BYTES + (second % 10) * 20_000_000)
            await asyncio.sleep(1)

    async def _let_things_break(self) -> None:
        """One after the other, each for some scrapes."""
        _tell(self.spare, "load")
        self.spare.wait_until_ready()
        for breaks in (self._outgrow, self.driver.lose, lambda: _tell(self.card, "die")):
            breaks()
            await asyncio.sleep(SETTLE_SECONDS)
        await self._drain_and_end()

    def _outgrow(self) -> None:
        _tell(self.card, "grow")
        _tell(self.spare, "grow")

    async def _drain_and_end(self) -> None:
        _tell(self.spare, "hold")
        async with connect(self.spare.url) as client:
            held = asyncio.create_task(_ask(client))
            await asyncio.sleep(1)
            self.spare.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(SETTLE_SECONDS)
            self.spare.process.kill()
            await asyncio.gather(held, return_exceptions=True)
        await asyncio.sleep(SETTLE_SECONDS)


def _tell(service: Replica, deed: str) -> None:
    """Of `deployment.monitoring.scripted.Script`."""
    httpx.post(f"{service.url}/script/{deed}", timeout=DEADLINE_SECONDS).raise_for_status()


async def _ask(client: httpx.AsyncClient) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=ASKED)
