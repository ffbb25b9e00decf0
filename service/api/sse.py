"""Server-sent events: a response that keeps a silent connection open and tells of errors to the last.

Until the first event is there or the silence gets long, nothing is sent, so that a refusal can still be a
status. After that an error is a frame: a stream that merely ends looks complete to the OpenAI SDKs.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.api.connection import while_connected
from service.api.errors import ClientGone, answer

DATA, END = b"data: ", b"\n\n"  # of one event
DONE = DATA + b"[DONE]" + END
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would collect the frames
}


def frame(data: bytes) -> bytes:
    """One event. `data` is JSON, which has no line breaks of its own."""
    return DATA + data + END


class EventStream(Response):
    """Sends the frames of a generator, which is closed at the end and as soon as the client leaves."""

    def __init__(
        self, frames: AsyncGenerator[bytes, None], keep_alive_s: float, headers: Mapping[str, str]
    ) -> None:
        super().__init__(headers={**HEADERS, **headers})
        del self.headers["content-length"]
        self._frames = frames
        self._keep_alive_s = keep_alive_s  # 0: no comments

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002
        writer = _Writer(send, self.raw_headers)
        with contextlib.suppress(ClientGone):
            await while_connected(self._write(writer), receive)

    async def _write(self, writer: _Writer) -> None:
        """Raises what the generator raises as long as no byte was sent."""
        ticker = asyncio.ensure_future(writer.keep_alive(self._keep_alive_s)) if self._keep_alive_s else None
        try:
            async with contextlib.aclosing(self._frames) as frames:
                async for data in frames:
                    await writer.write(data)
        except Exception as err:
            if not writer.started:
                raise
            await writer.write(frame(answer(err).body()))
        finally:
            if ticker:
                ticker.cancel()
        await writer.end()


class _Writer:
    """The ASGI side of one stream; knows when something was last sent."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self.started = False
        self._send, self._headers = send, headers
        self._last = time.monotonic()
        self._lock = asyncio.Lock()  # frames and comments come from two tasks

    async def write(self, data: bytes) -> None:
        async with self._lock:
            self._last = time.monotonic()
            await self._start()
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        await self._start()  # a stream without a frame is an empty one
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self) -> None:
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})

    async def keep_alive(self, after_s: float) -> None:
        """Send a comment whenever nothing was sent for `after_s` seconds. Runs until it is cancelled."""
        while True:
            silent_s = time.monotonic() - self._last
            if silent_s < after_s:
                await asyncio.sleep(after_s - silent_s)
            else:
                await self.write(KEEP_ALIVE)
