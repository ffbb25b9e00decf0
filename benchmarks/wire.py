"""The client of benchmarks.client for a server on the same cores: it takes next to nothing of them.

httpx and its HTTP parser, which is Python, need 150 µs for each piece of a stream: more than the server needs
to make one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

from benchmarks.client import Arrived, Sample, ServerError, sample_of, streaming

OK = 200


class _Answer(asyncio.Protocol):
    """One response: its status, and its body with the times at which it came."""

    def __init__(self) -> None:
        self.arrived: Arrived = []
        self.ended = asyncio.get_running_loop().create_future()
        self._parser = httptools.HttpResponseParser(self)

    @property
    def status(self) -> int:
        return int(self._parser.get_status_code())

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self.arrived.append((time.perf_counter(), data))

    def on_message_complete(self) -> None:
        self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ServerError("the connection ended within an answer"))


def together(url: str, bodies: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """All at once, a connection each. Raises ServerError."""

    async def all_of_them() -> list[Sample]:
        return await asyncio.gather(*(_ask(url, body) for body in bodies))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(all_of_them())


async def _ask(url: str, body: Mapping[str, Any]) -> Sample:
    host, port = urlsplit(url).hostname, urlsplit(url).port
    transport, protocol = await asyncio.get_running_loop().create_connection(_Answer, host, port)
    answer = cast(_Answer, protocol)
    started = time.perf_counter()
    transport.write(_request(f"{host}:{port}", json.dumps(streaming(body)).encode()))
    try:
        await answer.ended
    finally:
        transport.close()
    if answer.status != OK:
        raise ServerError(f"{answer.status}: {b''.join(data for _, data in answer.arrived)!r}")
    return sample_of(started, answer.arrived)


def _request(host: str, body: bytes) -> bytes:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
