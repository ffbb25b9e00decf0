"""An engine without a web server, asked from an event loop as the server does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from service.backend import Backend, Progress
from service.boot import start_backend
from service.engine.types import Request, SamplingParams
from service.planning import make_plan_for
from service.settings import Settings


@contextmanager
def backend_of(model: Path, device: str, context: int, concurrency: int) -> Iterator[Backend]:
    """A model in this process, planned and loaded as `snugfit serve` does it."""
    settings = Settings(model=str(model), device=device, context=context, concurrency=concurrency)
    backend = start_backend(settings, make_plan_for(settings), Progress())
    try:
        yield backend
    finally:
        backend.close()


@dataclass(frozen=True)
class Times:
    """Medians over the streams of one run, in milliseconds."""

    first: float
    token: float

    @classmethod
    def of(cls, streams: Sequence[tuple[float, float]]) -> Times:
        """From (seconds to the first token, seconds of each further one)."""
        firsts, tokens = zip(*streams, strict=True)
        return cls(1e3 * median(firsts), 1e3 * median(tokens))

    def minus(self, other: Times) -> Times:
        return Times(self.first - other.first, self.token - other.token)


class Bare:
    """Asks the engine of a backend the same length of answer to many questions at once."""

    def __init__(self, backend: Backend, tokens: int) -> None:
        self._backend = backend
        self._params = SamplingParams(max_tokens=tokens, temperature=0)

    def run(self, prompts: Sequence[str]) -> Times:
        requests = []
        for prompt in prompts:
            ids = self._backend.template.encode([{"role": "user", "content": prompt}])
            requests.append(Request(prompt[:16], ids, self._params))
        return Times.of(asyncio.run(self._together(requests)))

    async def _together(self, requests: Sequence[Request]) -> list[tuple[float, float]]:
        return await asyncio.gather(*map(self._one, requests))

    async def _one(self, request: Request) -> tuple[float, float]:
        started, arrived = time.perf_counter(), []
        async for event in self._backend.engine.generate(request):
            if event.text:
                arrived.append(time.perf_counter())
        return arrived[0] - started, (arrived[-1] - arrived[0]) / (self._params.max_tokens - 1)
