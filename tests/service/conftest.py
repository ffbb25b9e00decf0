"""A scripted engine, and the real application on a real port."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import httpx
import openai
import pytest

from loader.budget import MemoryBudget
from loader.checkpoint import ModelSpec
from loader.kv_layout import KvGroup, KvLayout
from loader.plan import DevicePlan, Plan
from service.backend import Backend
from service.engine.types import EngineDead, EngineStats, Histogram, TokenEvent
from service.prompt.defaults import GenerationDefaults
from service.prompt.token_text import TokenText
from service.settings import Settings

DEADLINE_S = 10
NAME = "lab/tiny"
HALVES = ("🙂".encode()[:2], "🙂".encode()[2:])


def until(condition, what="it"):
    """Poll with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {DEADLINE_S} s"
        time.sleep(0.005)


class ScriptedEngine:
    """Says `pieces`, one per token. Before token `hold_at` it waits for `release()`; it may raise instead."""

    def __init__(self, pieces=("Hel", "lo"), finish="stop", hold_at=None, raise_at=None, error=None):
        self.pieces, self.finish, self.hold_at = tuple(pieces), finish, hold_at
        self.raise_at, self.error = raise_at, error
        self.requests, self.aborted, self.running, self.ended = [], [], 0, 0
        self.alive, self.queued_s = True, 0.0
        self._released = threading.Event()

    def release(self):
        self._released.set()

    async def generate(self, request):
        self.requests.append(request)
        self.running += 1
        complete = False
        try:
            for i, piece in enumerate(self.pieces):
                await self._hold(i)
                last = i + 1 == len(self.pieces)
                yield TokenEvent(piece, i, i + 1, self.finish if last else None, queued_s=self.queued_s)
            complete = True
        finally:
            self.running -= 1
            self.ended += complete
            if not complete:
                self.aborted.append(request.id)

    async def _hold(self, i):
        while i == self.hold_at and self.alive and not self._released.is_set():
            await asyncio.sleep(0.002)
        if i == self.raise_at:
            raise self.error
        if not self.alive:
            raise EngineDead("the engine has ended")

    def stats(self):
        latency = Histogram(bounds=(0.1, 1.0), counts=(3, 2, 1), total=4.5)
        return EngineStats(
            alive=self.alive, running=self.running, waiting=0, waiting_limit=64, context=64,
            kv_tokens_used=16, kv_tokens_total=64, prompt_tokens=100, generation_tokens=50,
            finished={"stop": self.ended, "cancelled": len(self.aborted)}, rejected=2,
            time_to_first_token=latency, kv_blocks_used=3, kv_blocks_total=8, preemptions=4,
            prefix_queries=80, prefix_hits=60, steps=30, out_of_memory=1, timed_out=5,
            batch_size=Histogram((1.0, 4.0), (10, 15, 5), 90.0), step_time=Histogram((0.01,), (20, 10), 0.6),
        )  # fmt: skip

    def close(self):
        self.alive = False


class WordTemplate:
    """One id per word; `seen` keeps the messages. Of its 100 tokens the first are half an emoji each."""

    tokens = SimpleNamespace(
        count=100,
        of=lambda id_: TokenText("\ufffd", HALVES[id_]) if id_ < 2 else TokenText(f"t{id_}", b"t%d" % id_),
    )

    def __init__(self):
        self.seen = []

    def encode(self, messages):
        self.seen.append(messages)
        return tuple(range(sum(len(message["content"].split()) for message in messages)))

    def least_tokens(self, messages):
        return sum(len(message["content"]) for message in messages) // 1000


class Measured:
    baseline_bytes = 300

    def measured_peak_bytes(self):
        return {"cpu": 700}


class Live:
    """The application under uvicorn on a free port, and what is inside."""

    def __init__(self, app, engine, template):
        from service.server import DrainingServer

        self.app, self.engine, self.template = app, engine, template
        self.service = app.state.service
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.server = DrainingServer(app, self.service, app.state.settings.drain_seconds)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]})

    def start(self):
        self._thread.start()
        until(lambda: self.server.started, "starting")

    def signal(self, number=15):
        self.server.handle_exit(number, None)

    def wait_until_ended(self):
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def stop(self):
        if self._thread.is_alive():
            self.signal()
            self.signal()  # do not wait for what a test left running
        self.wait_until_ended()

    def ask(self, **more):
        return {"model": NAME, "messages": [{"role": "user", "content": "say hello"}], **more}

    def post(self, headers=None, **more):
        return httpx.post(
            f"{self.url}/v1/chat/completions", json=self.ask(**more), headers=headers, timeout=DEADLINE_S
        )

    def get(self, path, **options):
        return httpx.get(self.url + path, timeout=DEADLINE_S, **options)

    def client(self, kind=openai.OpenAI, **options):
        return kind(base_url=f"{self.url}/v1", **{"api_key": "any", "max_retries": 0, **options})


@pytest.fixture
def plan():
    device = DevicePlan("cpu", 1000, 400, 200, 100, 50, 0, 10)
    return Plan(
        spec=ModelSpec("m", None, {}, ()), budget=MemoryBudget(("cpu",), {"cpu": 1000}), family="f",
        exact=True, dtype="bfloat16", weights_bytes=400, resident_bytes=400, offloaded_bytes=0,
        kv_bytes_per_token=2, batching="continuous",
        kv=KvLayout(20, (KvGroup(None, (0, 1), 5),)), context=64, concurrency=1, chunk_tokens=16,
        device_map={"": "cpu"}, max_memory={"cpu": 400}, devices=(device,),
    )  # fmt: skip


@pytest.fixture
def build(plan):
    """Makes an application that is not running: `build(engine, start=None, **settings)`."""
    usual = plan

    def make(engine=None, start=None, plan=usual, tracing=None, **settings):
        from service.app import create_app  # late: most tests beside these need no server

        engine, template = engine or ScriptedEngine(), WordTemplate()

        def instant(_progress):
            opened = ExitStack()
            opened.callback(engine.close)
            return Backend(
                engine=engine, template=template, context=64, defaults=GenerationDefaults(),
                created=1_700_000_000, dtype="bfloat16", memory=Measured(), opened=opened,
            )  # fmt: skip

        known = {"served_model_name": NAME, "drain_seconds": 5.0, **settings}
        return Live(create_app(Settings(**known), start or instant, plan, tracing), engine, template)

    return make


@pytest.fixture
def running(build):
    """Runs applications: `with running(engine, …) as live`, ready unless `wait=False`."""

    @contextmanager
    def run(engine=None, wait=True, **options):
        live = build(engine, **options)
        live.start()
        try:
            if wait:
                until(lambda: live.service.ready, "readiness")
            yield live
        finally:
            live.stop()

    return run


@pytest.fixture
def live(running):
    with running() as one:
        yield one


@pytest.fixture
def scripted():
    return ScriptedEngine


@pytest.fixture(name="until")
def until_fixture():
    return until


@pytest.fixture
def service_log(caplog, monkeypatch):
    """What the package logs, also where a test before has sent it to stderr."""
    monkeypatch.setattr(logging.getLogger("service"), "propagate", True)
    caplog.set_level(logging.DEBUG, "service")
    return caplog
