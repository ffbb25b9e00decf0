"""What wraps every request, as plain ASGI: Starlette's BaseHTTPMiddleware hides that a client has left.

From the outside in: RequestId, CORS, ErrorBoundary, ApiKeys, BodyLimit, Gate. Where requests are traced,
`service.tracing.RequestSpans` stands outside of them all.
"""

from __future__ import annotations

import logging
import re
import time
from urllib.parse import quote
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import logs
from service.api.errors import BodyTooLarge, answer
from service.lifecycle import Draining, Service

REQUEST_ID = "x-request-id"
SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")
PROBES = frozenset({"/health", "/ready", "/metrics"})
CLIENT_GONE = 499

log = logging.getLogger("service.access")


class RequestId:
    """Gives every response the client's x-request-id or a new one, counts it and logs a line about it.

    While the service drains, a response also ends its connection: a proxy that keeps connections open would
    send the next request down the same one, and find nobody.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = given if SANE_ID.fullmatch(given) else f"req_{uuid4().hex}"
        # Not reset: a request is a task of its own, and what went wrong is logged by uvicorn, after us.
        logs.request_id.set(request_id)
        begun, status = time.monotonic(), CLIENT_GONE

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                if self._service.draining:
                    headers["connection"] = "close"
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        finally:
            self._record(scope, status, time.monotonic() - begun, request_id)

    def _record(self, scope: Scope, status: int, seconds: float, request_id: str) -> None:
        probe = scope["path"] in PROBES
        if not probe:
            self._service.responses[status] += 1
        method, path = scope["method"], quote(scope["path"])
        fields = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4)}
        log.log(
            logging.DEBUG if probe else logging.INFO,
            "%s %s %d %.3f s %s", method, path, status, seconds, request_id,
            extra={"fields": fields},
        )  # fmt: skip


class ErrorBoundary:
    """Turns what nothing inside has answered into an error response, by the table in `service.api.errors`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception as err:
            if started or scope["type"] != "http":
                raise
            await answer(err).response()(scope, receive, send)


class BodyLimit:
    """Refuses a body over the limit by its declared length, or as soon as it has grown past it."""

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app, self._limit_bytes = app, limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            declared = Headers(scope=scope).get("content-length", "")
            self._check(int(declared) if declared.isdecimal() else 0)
        seen_bytes = 0

        async def counted() -> Message:
            nonlocal seen_bytes
            message = await receive()
            seen_bytes += len(message.get("body", b""))
            self._check(seen_bytes)
            return message

        await self._app(scope, counted, send)

    def _check(self, n_bytes: int) -> None:
        if n_bytes > self._limit_bytes:
            raise BodyTooLarge(self._limit_bytes)


class Gate:
    """Counts the requests being answered, for which draining waits; once it drains, new ones are refused."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            return await self._app(scope, receive, send)
        if self._service.draining:
            raise Draining
        with self._service.answering():
            await self._app(scope, receive, send)
