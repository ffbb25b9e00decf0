"""The n answers to one request, as one stream of what came."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from service.engine.types import StepFailed, TokenEvent

Events = AsyncGenerator[TokenEvent, None]
Came = list[tuple[int, TokenEvent]]  # index of the answer, and its next event


async def together(answers: Sequence[Events]) -> AsyncGenerator[Came, None]:
    """What has come since the last time, never nothing; ends when all answers have. Of several answers that
    is all; an only one is passed on event by event, as fast as they are taken.

    The first answer begins alone. Once its first token is there, its prompt is in the engine's pool, and the
    others find its whole blocks there. Whether the queue takes them shows before anything is given out. An
    error of one ends all, as does closing, and the engine has let go of all of them when this returns. An
    answer without a finish_reason is an error: one cut short must not look whole.
    """
    if len(answers) == 1:  # as nearly always: without a task in between, which each token would have to wake
        async with aclosing(_whole(answers[0])) as events:
            async for event in events:
                yield [(0, event)]
        return
    inbox = _Inbox()
    try:
        inbox.open(0, answers[0])
        while came := await inbox.take():
            if inbox.opened < len(answers):
                for index, answer in enumerate(answers[1:], start=1):
                    inbox.open(index, answer)
                await asyncio.sleep(0)  # each asks the engine
                inbox.check()
            yield came
    finally:
        await inbox.close()


async def _whole(answer: Events) -> Events:
    """The same events. Raises StepFailed at the end of one without a finish_reason."""
    reason = None
    async with aclosing(answer):
        async for event in answer:
            reason = event.finish_reason
            yield event
    if reason is None:
        raise StepFailed("the engine ended the answer without a reason")


class _Inbox:
    """What came and was not taken yet. One task for each answer fills it."""

    def __init__(self) -> None:
        self._came: Came = []
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._ended = 0

    @property
    def opened(self) -> int:
        return len(self._tasks)

    def open(self, index: int, answer: Events) -> None:
        self._tasks.append(asyncio.create_task(self._fill(index, answer)))

    async def take(self) -> Came:
        """All that came, waiting for the first; nothing at the end. Raises what an answer raised."""
        while not self._came:
            self.check()
            if self._ended == self.opened:
                break
            self._changed.clear()
            await self._changed.wait()
        came, self._came = self._came, []
        return came

    def check(self) -> None:
        if self._error:
            raise self._error

    async def close(self) -> None:
        """Cancel and wait until every clean-up has run: then the engine knows that the requests are gone."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _fill(self, index: int, answer: Events) -> None:
        try:
            async with aclosing(_whole(answer)) as events:
                async for event in events:
                    self._came.append((index, event))
                    self._changed.set()
        except Exception as err:
            self._error = self._error or err
        finally:
            self._ended += 1
            self._changed.set()
