"""What clients do to a service, the bad ones too: conversations, bursts, mistakes, and some that leave."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import cycle
from typing import Any

import httpx

from benchmarks.client import connect

TALKERS = 6
TURNS = 3
BURST, BURST_EVERY_SECONDS = 24, 8
LENGTHS = (60, 150, 100, 200, 80)  # of answers, in tokens
QUESTIONS = ("Who are you?", "What is snugfit?", "Tell me about your budget.", "What can you do?")

Asked = dict[str, Any]


class Traffic:
    """`statuses` counts the answers; 0 is for a client that left."""

    def __init__(self, url: str, model: str, seconds: float) -> None:
        self.statuses: Counter[int] = Counter()
        self._url, self._model, self._seconds = url, model, seconds
        self._questions, self._lengths = cycle(QUESTIONS), cycle(LENGTHS)

    async def run(self) -> None:
        self._end = time.monotonic() + self._seconds
        async with connect(self._url) as self._client:
            others = (self._burst, self._ask_for_another_model, self._ask_wrongly, self._leave)
            pauses = (BURST_EVERY_SECONDS, 1.0, 1.5, 2.0)
            await asyncio.gather(
                *(self._repeat(self._talk, 0.1) for _ in range(TALKERS)),
                *(self._repeat(one, pause) for one, pause in zip(others, pauses, strict=True)),
            )

    async def _repeat(self, what: Callable[[], Awaitable[None]], pause: float) -> None:
        while time.monotonic() < self._end:
            await what()
            await asyncio.sleep(pause)

    async def _talk(self) -> None:
        """A conversation: each turn begins with those before it."""
        messages: list[dict[str, str]] = []
        for _ in range(TURNS):
            messages.append({"role": "user", "content": next(self._questions)})
            answer = await self._post(self._asked(messages, next(self._lengths)))
            if answer is None:
                return
            messages.append({"role": "assistant", "content": answer})

    async def _burst(self) -> None:
        question = [{"role": "user", "content": next(self._questions)}]
        await asyncio.gather(*(self._stream(self._asked(question, 350)) for _ in range(BURST)))

    async def _ask_for_another_model(self) -> None:
        await self._post({**self._asked([{"role": "user", "content": "Hello"}], 5), "model": "another"})

    async def _ask_wrongly(self) -> None:
        await self._post({**self._asked([{"role": "user", "content": "Hello"}], 5), "temperature": 9})

    async def _leave(self) -> None:
        await self._stream(self._asked([{"role": "user", "content": "Tell me a long story."}], 400), chunks=3)

    def _asked(self, messages: list[dict[str, str]], max_tokens: int) -> Asked:
        return {"model": self._model, "messages": messages, "max_tokens": max_tokens, "ignore_eos": True}

    async def _post(self, asked: Asked) -> str | None:
        """The answer's text, or None when it is refused."""
        response = await self._client.post("/v1/chat/completions", json=asked)
        self.statuses[response.status_code] += 1
        if response.is_error:
            return None
        return str(response.json()["choices"][0]["message"]["content"])

    async def _stream(self, asked: Asked, chunks: int | None = None) -> None:
        """Read a stream to its end, or leave after so many chunks."""
        async with self._client.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as got:
            async for _ in _counted(got, chunks):
                pass
            self.statuses[got.status_code if chunks is None or got.is_error else 0] += 1


async def _counted(response: httpx.Response, chunks: int | None) -> AsyncIterator[bytes]:
    count = 0
    async for chunk in response.aiter_bytes():
        yield chunk
        count += 1
        if count == chunks:
            return
