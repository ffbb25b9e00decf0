"""A scripted engine: the same protocol, no model, no thread. For tests of what stands above the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from service.engine.stats import Capacity, Meter
from service.engine.stop_strings import StopStrings
from service.engine.types import EngineDead, EngineStats, Request, RequestTooLong, StepFailed, TokenEvent


class FakeEngine:
    """Answers every request with `pieces`, one per token; the token ids are their indices.

    `delay_s` passes before each token. `fail_after=n` raises StepFailed after n tokens. `held=True` stops
    before the first token until `release()`. `dead=True` answers EngineDead, as `die()` makes it do later.
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
    ) -> None:
        self.requests: list[Request] = []
        self.aborted: list[str] = []  # ids of requests whose client left
        self._pieces, self._delay_s, self._fail_after = tuple(pieces), delay_s, fail_after
        self._capacity = Capacity(concurrency, context, queue_limit)
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
            self._meter.admit(started - arrived)
            self._meter.read_prompt(len(request.prompt_ids))
            async for event in self._events(request):
                reason = event.finish_reason or reason
                yield event
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
        self._meter.finish(reason, now - arrived, None if started is None else now - started)
        self._wake()

    async def _events(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        stops = StopStrings(request.params.stop)
        last = min(request.params.max_tokens, len(self._pieces))
        previous = time.monotonic()
        for count, piece in enumerate(self._pieces[:last], start=1):
            await self._before_token(count)
            now = time.monotonic()
            (self._meter.first_token if count == 1 else self._meter.next_token)(now - previous)
            previous = now
            text = stops.push(piece)
            reason = "stop" if stops.found else self._reason(request, count, last)
            text += stops.flush() if reason else ""
            yield TokenEvent(text, count - 1, count, reason)
            if reason:
                return

    def _reason(self, request: Request, count: int, last: int) -> str | None:
        if count < last:
            return None
        return "length" if last == request.params.max_tokens else "stop"

    async def _before_token(self, count: int) -> None:
        await self._wait_while(lambda: self._held)
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
