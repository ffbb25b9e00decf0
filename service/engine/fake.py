"""A scripted engine: the same protocol, no model, no thread. For tests of what stands above the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import replace

from service.engine.stats import Capacity, Ended, Meter, Occupancy, StepCount
from service.engine.stop_strings import StopStrings
from service.engine.types import (
    EngineDead,
    EngineStats,
    Logprobs,
    Request,
    RequestTooLong,
    StepFailed,
    TokenEvent,
)


class FakeEngine:
    """Answers every request with `pieces`, one per token; the token ids are their indices.

    `delay_s` passes before each token, or before each `burst` of them, which then come at once.
    `fail_after=n` raises StepFailed after n tokens. `held=True` stops before the first token until
    `release()`. `dead=True` answers EngineDead, as `die()` makes it do later. `logprobs` go with each token
    of a request that asks for them, the last one with all that follow; `cached_tokens` are told of each
    prompt, but for its last token.
    """

    def __init__(
        self,
        pieces: Sequence[str],
        delay_s: float = 0.0,
        fail_after: int | None = None,
        queue_limit: int = 64,
        dead: bool = False,
        concurrency: int = 4,
        context: int = 4096,
        held: bool = False,
        logprobs: Sequence[Logprobs] = (Logprobs(-0.5),),
        cached_tokens: int = 0,
        burst: int = 1,
    ) -> None:
        self.requests: list[Request] = []
        self.aborted: list[str] = []  # ids of requests whose client left
        self._pieces, self._delay_s, self._fail_after = tuple(pieces), delay_s, fail_after
        self._logprobs, self._cached_tokens, self._burst = tuple(logprobs), cached_tokens, burst
        self._capacity = Capacity(concurrency, context, queue_limit, concurrency * context, concurrency)
        self._meter = Meter(self._capacity)
        self._held = held
        self._running = 0
        self._alive = True
        self._changed = asyncio.Event()  # belongs to the loop of the first request; replaced at each change
        if dead:
            self.die()

    def release(self) -> None:
        """Let held requests go on. Call it on the loop of the requests."""
        self._held = False
        self._wake()

    def die(self) -> None:
        """Fail every request, now and later. Call it on the loop of the requests when some run."""
        self._alive = False
        self._meter.die()
        self._wake()

    def close(self) -> None:
        if self._alive:
            self.die()

    def stats(self) -> EngineStats:
        return self._meter.snapshot()

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self._check(request)
        self._meter.enqueue()
        self.requests.append(request)
        arrived, started, reason = time.monotonic(), None, "cancelled"
        try:
            await self._wait_while(lambda: self._running >= self._capacity.concurrency)
            started = time.monotonic()
            self._running += 1
            self._meter.place([started - arrived], 0, self._occupancy())
            async for event in self._events(request):
                reason = event.finish_reason or reason
                yield replace(event, queued_s=started - arrived)
        except (StepFailed, EngineDead):
            reason = "error"
            raise
        finally:
            self._leave(request, reason, arrived, started)

    def _check(self, request: Request) -> None:
        if not self._alive:
            raise EngineDead("the engine has ended")
        if len(request.prompt_ids) >= self._capacity.context:
            raise RequestTooLong(len(request.prompt_ids), self._capacity.context)

    def _leave(self, request: Request, reason: str, arrived: float, started: float | None) -> None:
        now = time.monotonic()
        if reason == "cancelled":
            self.aborted.append(request.id)
        self._running -= started is not None
        ended = Ended(reason, now - arrived, None if started is None else now - started)
        self._meter.end([ended], self._occupancy())
        self._wake()

    def _occupancy(self) -> Occupancy:
        """As if each request held one block."""
        return Occupancy(running=self._running, kv_blocks=self._running)

    async def _events(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        params = request.params
        stops = StopStrings(params.stop)
        last = min(params.max_tokens, len(self._pieces))
        cached = max(0, min(self._cached_tokens, len(request.prompt_ids) - 1))
        previous = time.monotonic()
        for count, piece in enumerate(self._pieces[:last], start=1):
            await self._before_token(count)
            previous = self._count(request, count, previous)
            text = stops.push(piece, may_end=count > params.min_tokens)
            reason = "stop" if stops.found else self._reason(request, count, last)
            text += stops.flush() if reason else ""
            yield TokenEvent(text, count - 1, count, reason, self._logprobs_of(request, count), cached)
            if reason:
                return

    def _count(self, request: Request, count: int, previous: float) -> float:
        now = time.monotonic()
        step = StepCount(rows=1, seconds=now - previous)
        if count == 1:
            step.prompt_tokens = len(request.prompt_ids)
        (step.first_token_s if count == 1 else step.next_token_s).append(now - previous)
        self._meter.step(step, self._occupancy())
        return now

    def _logprobs_of(self, request: Request, count: int) -> Logprobs | None:
        wanted = request.params.logprobs
        if wanted is None:
            return None
        scripted = self._logprobs[min(count, len(self._logprobs)) - 1]
        return replace(scripted, top=scripted.top[:wanted])

    def _reason(self, request: Request, count: int, last: int) -> str | None:
        if count < last:
            return None
        return "length" if last == request.params.max_tokens else "stop"

    async def _before_token(self, count: int) -> None:
        await self._wait_while(lambda: self._held)
        if (count - 1) % self._burst == 0:
            await asyncio.sleep(self._delay_s)
        if not self._alive:
            raise EngineDead("the engine has ended")
        if self._fail_after is not None and count > self._fail_after:
            raise StepFailed(f"scripted to fail after {self._fail_after} tokens")

    async def _wait_while(self, condition: Callable[[], bool]) -> None:
        while self._alive and condition():
            await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
