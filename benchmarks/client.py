"""A streaming client of an OpenAI server that keeps the time of every token."""

from __future__ import annotations

import asyncio
import json
import random
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import httpx

CLIENT_SECONDS = 3600
Message = dict[str, str]
Arrived = list[tuple[float, bytes]]  # (time.perf_counter(), a part of a response's body)


@dataclass(frozen=True)
class Sample:
    """One streamed answer; times in seconds."""

    first: float  # from sending to the first text
    gaps: list[float]  # between two pieces of text
    ended: float  # time.perf_counter() of the last piece
    prompt_tokens: int | None  # None: the server did not say
    completion_tokens: int | None
    cached_tokens: int | None

    @property
    def pieces(self) -> int:
        """Pieces of text: as many as tokens, unless a token is part of a character or shares a piece."""
        return len(self.gaps) + 1

    @property
    def decode_seconds(self) -> float:
        return sum(self.gaps)


class ServerError(Exception):
    """The stream held an error instead of an answer."""


class NoText(ServerError):
    """The answer had nothing that could be shown, so that there is no time to the first token."""


async def ask(client: httpx.AsyncClient, body: Mapping[str, Any]) -> Sample:
    """One chat completion. Raises httpx.HTTPStatusError, ServerError or NoText."""
    started, arrived = time.perf_counter(), []
    async with client.stream("POST", "/v1/chat/completions", json=streaming(body)) as response:
        response.raise_for_status()
        async for data in response.aiter_bytes():
            arrived.append((time.perf_counter(), data))
    return sample_of(started, arrived)


def streaming(body: Mapping[str, Any]) -> dict[str, Any]:
    return {**body, "stream": True, "stream_options": {"include_usage": True}}


def sample_of(started: float, arrived: Arrived) -> Sample:
    """What a stream said, read when it is over, so that reading it holds up no other one."""
    times: list[float] = []
    usage: dict[str, Any] = {}
    for at, event in _events(arrived):
        if "error" in event:
            raise ServerError(str(event["error"]))
        if event["choices"] and event["choices"][0]["delta"].get("content"):
            times.append(at)
        usage = event.get("usage") or usage
    if not times:
        raise NoText("the answer had no text")
    details = usage.get("prompt_tokens_details") or {}
    return Sample(
        first=times[0] - started,
        gaps=[after - before for before, after in pairwise(times)],
        ended=times[-1],
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        cached_tokens=details.get("cached_tokens"),
    )


def _events(arrived: Arrived) -> Iterator[tuple[float, dict[str, Any]]]:
    """Each event with the time at which its end came."""
    rest = b""
    for at, data in arrived:
        *frames, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for frame in frames:
            if frame.startswith(b"data: {"):
                yield at, json.loads(frame.removeprefix(b"data: "))


async def together(
    url: str, bodies: Sequence[Mapping[str, Any]], places: int | None = None
) -> tuple[float, list[Sample]]:
    """(seconds from the first request to the last token, samples); at most `places` requests at any time."""
    room = asyncio.Semaphore(places or len(bodies))
    async with connect(url) as client:

        async def one(body: Mapping[str, Any]) -> Sample:
            async with room:
                return await ask(client, body)

        started = time.perf_counter()
        samples = await asyncio.gather(*map(one, bodies))
    return max(sample.ended for sample in samples) - started, samples


def connect(url: str) -> httpx.AsyncClient:
    """As many connections as there are requests: no request waits in the client."""
    endless = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, timeout=CLIENT_SECONDS, limits=endless)


def letters(rng: random.Random, count: int) -> str:
    """Random letters, a token each for the tokenizer of make_model: no two prompts begin alike."""
    return "".join(rng.choices(string.ascii_lowercase, k=count))


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]
