"""The real service in a process of its own, with an engine that says a number a step. Prints its URL.

Tests change the environment: DRAIN is the limit for draining in seconds.
"""

import asyncio
import os
import socket
import sys
from contextlib import ExitStack
from types import SimpleNamespace

from service import logs
from service.app import create_app
from service.backend import Backend
from service.engine.types import EngineDead, EngineStats, TokenEvent
from service.prompt.defaults import GenerationDefaults
from service.server import serve
from service.settings import Settings

STEP_SECONDS = 0.02


class Counting:
    """An answer of `max_tokens` numbers."""

    alive, running = True, 0

    async def generate(self, request):
        self.running += 1
        try:
            for i in range(1, request.params.max_tokens + 1):
                await asyncio.sleep(STEP_SECONDS)
                if not self.alive:
                    raise EngineDead("the engine was closed")
                yield TokenEvent(f"{i} ", i, i, "length" if i == request.params.max_tokens else None)
        finally:
            self.running -= 1

    def stats(self):
        return EngineStats(self.alive, self.running, 0, 1, 4096, 0, 4096, 0, 0)

    def close(self):
        self.alive = False


class Bytes:
    tokens = SimpleNamespace(count=256)

    def encode(self, messages):
        return tuple("".join(message["content"] for message in messages).encode())

    def least_tokens(self, messages):
        return len(self.encode(messages))


def start(_progress):
    engine = Counting()
    opened = ExitStack()
    opened.callback(engine.close)
    return Backend(engine, Bytes(), 4096, GenerationDefaults(), 0, "float32", opened=opened)


if __name__ == "__main__":
    logs.to_stderr("info")
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    drain_seconds = float(os.environ.get("DRAIN", "10"))
    sys.exit(
        serve(
            create_app(Settings(served_model_name="counting", drain_seconds=drain_seconds), start), listener
        )
    )
