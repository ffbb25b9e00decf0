"""The real service with a scripted engine, in states that this machine cannot be brought into.

`python -m deployment.monitoring.scripted` prints its URL. It is planned for a GPU with `--gpu SIZE`, else for
the CPU, and stays in loading until it is told to go on: `POST /script/DEED`, DEED being a method of Script.
"""

from __future__ import annotations

import argparse
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import FastAPI

from benchmarks.make_model import make
from loader.plan import Plan
from loader.probe import resident_bytes
from service import logs
from service.app import create_app
from service.backend import Backend, Progress
from service.engine.fake import FakeEngine
from service.engine.types import EngineStats
from service.planning import make_plan_for
from service.prompt.defaults import GenerationDefaults
from service.prompt.token_text import TokenText
from service.server import serve
from service.settings import Settings

SHAPE, NAME = "1.5b", "scripted"
PIECES = tuple(f"{word} " for word in ("Nothing", "of", "this", "was", "computed", "by", "any", "model"))
STEP_SECONDS = 0.02
CONCURRENCY = 8


class Engine(FakeEngine):
    """Says PIECES; its retries are what it is told."""

    out_of_memory = 0

    def stats(self) -> EngineStats:
        return replace(super().stats(), out_of_memory=self.out_of_memory)

    def hold(self) -> None:
        self._held = True

    def fail(self) -> None:
        self._fail_after = 1


@dataclass
class Memory:
    """Of each device 98 % of what is planned; once it has grown, 99 % of the budget."""

    plan: Plan
    baseline_bytes: int
    grown: bool = False

    def measured_peak_bytes(self) -> Mapping[str, int]:
        if self.grown:
            return {device.device: device.budget_bytes * 99 // 100 for device in self.plan.devices}
        return {device.device: device.peak_bytes * 98 // 100 for device in self.plan.devices}


class Tokens:
    count = 256

    def of(self, token_id: int) -> TokenText:
        return TokenText(chr(token_id), bytes([token_id]))


class Template:
    """A token for each byte."""

    tokens = Tokens()

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        return tuple("".join(message["content"] for message in messages).encode())

    def least_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        return len(self.encode(messages))


class Script:
    """Each deed is done on the loop of the requests."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.memory = plan, Memory(plan, resident_bytes())
        self.engine = Engine(PIECES, delay_s=STEP_SECONDS, concurrency=CONCURRENCY, context=plan.context)
        self._may_load = threading.Event()

    def start(self, progress: Progress) -> Backend:
        """On the loading thread, as `create_app` wants it."""
        progress.enter("waiting to be told")
        while not self._may_load.wait(0.05):
            progress(0, self.plan.weights_bytes)  # raises when the service is to stop
        opened = ExitStack()
        opened.callback(self.engine.close)
        return Backend(
            engine=self.engine, template=Template(), context=self.plan.context, defaults=GenerationDefaults(),
            created=0, dtype=self.plan.dtype, memory=self.memory, opened=opened,
        )  # fmt: skip

    async def load(self) -> None:
        """Become ready."""
        self._may_load.set()

    async def hold(self) -> None:
        """Let no request have its first token until `release`."""
        self.engine.hold()

    async def release(self) -> None:
        self.engine.release()

    async def fail(self) -> None:
        """Break every answer after its first token."""
        self.engine.fail()

    async def retry(self) -> None:
        """Count a step that ran out of memory."""
        self.engine.out_of_memory += 1

    async def grow(self) -> None:
        """Take more than was planned."""
        self.memory.grown = True

    async def die(self) -> None:
        self.engine.die()


def application(budget: str, gpu: str | None = None) -> tuple[FastAPI, Script]:
    """The service, and what it can be told to do.

    On a GPU it is planned for a 1.5B whose weights are nowhere, on the CPU for the built-in model.
    """
    settings = Settings(
        served_model_name=NAME,
        budget=budget,
        device="auto" if gpu else "cpu",
        context=2048,
        concurrency=CONCURRENCY,
    )
    with tempfile.TemporaryDirectory() as folder:
        model = str(make(SHAPE, Path(folder), headers_only=True)) if gpu else None
        plan = make_plan_for(settings.model_copy(update={"model": model}), gpu)
    script = Script(plan)
    app = create_app(settings, script.start, plan)
    for deed in ("load", "hold", "release", "fail", "retry", "grow", "die"):
        app.add_api_route(f"/script/{deed}", getattr(script, deed), methods=["POST"])
    return app, script


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deployment.monitoring.scripted",
        description=__doc__.partition("\n")[0] if __doc__ else None,
    )
    parser.add_argument("--budget", required=True, help="as for snugfit serve")
    parser.add_argument("--gpu", help="size of the card that is planned for")
    arguments = parser.parse_args()
    logs.to_stderr("info")
    app, _ = application(arguments.budget, arguments.gpu)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    return serve(app, listener)


if __name__ == "__main__":
    sys.exit(main())
