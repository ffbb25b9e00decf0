"""Runs the application under uvicorn, and stops it the way a load balancer wants: drain first, then close.

uvicorn closes its listening socket as soon as it is told to stop, and new requests would find no server. Here
the first signal starts draining: the socket stays open, what runs goes on, the rest is answered with 503.
Connections that wait for their next request are closed at once, the others after their response, so that
whoever keeps them open turns to another replica. A request that is half received is still answered.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from functools import partial
from types import FrameType

import uvicorn
from fastapi import FastAPI

from loader.plan import Plan
from service.app import create_app
from service.lifecycle import Service
from service.settings import Settings
from service.tracing import Tracing

POLL_SECONDS = 0.05
LAST_FRAMES_SECONDS = 2  # for what was cut off to tell its client
IDLE_CONNECTION_SECONDS = 75  # more than the 60 s of common load balancers

log = logging.getLogger(__name__)


def run(settings: Settings, plan: Plan, listener: socket.socket, tracing: Tracing | None = None) -> int:
    """Serve until a signal. The exit code: 0, or 128 + signal when a second one cut the draining short.

    Raises what loading raised: a LoaderError has its own exit code.
    """
    from service.boot import start_backend

    return serve(create_app(settings, partial(start_backend, settings, plan), plan, tracing), listener)


def serve(app: FastAPI, listener: socket.socket) -> int:
    """`run` with an application that is put together already."""
    service: Service = app.state.service
    server = DrainingServer(app, service, app.state.settings.drain_seconds)
    server.run(sockets=[listener])
    if service.error:
        raise service.error
    return server.exit_code


class DrainingServer(uvicorn.Server):
    """A uvicorn server that drains before it exits, and exits when loading has failed."""

    def __init__(self, app: FastAPI, service: Service, drain_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                access_log=False,
                log_config=None,
                server_header=False,
                ws="none",
                timeout_keep_alive=IDLE_CONNECTION_SECONDS,
                timeout_graceful_shutdown=LAST_FRAMES_SECONDS,
            )
        )
        self._service = service
        self._drain_seconds = drain_seconds
        self._signals: list[int] = []
        self._stopping: asyncio.Task[None] | None = None

    @property
    def exit_code(self) -> int:
        return 0 if len(self._signals) < 2 else 128 + self._signals[1]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """The signal handler: only takes note, since it may interrupt anything."""
        self._signals.append(sig)

    async def on_tick(self, counter: int) -> bool:
        """uvicorn calls this ten times a second."""
        if self._stopping is None and (self._signals or self._service.error):
            self._stopping = asyncio.create_task(self._stop())
        return await super().on_tick(counter)

    async def _stop(self) -> None:
        log.info("stopping: %d requests are being answered", self._service.active)
        self._service.drain()
        self._let_connections_go()
        try:
            if not await self._idle_in_time():
                log.warning("stopping: %d requests are cut off", self._unfinished)
                await self._service.close()  # ends them with an error that their clients see
        finally:
            self.should_exit = True

    def _let_connections_go(self) -> None:
        """Close those that were answered and wait for the next request; the others close when they are done.

        One that has not asked anything yet is about to, and is told by its answer, as is one that is asking.
        """
        for connection in list(self.server_state.connections):
            if getattr(connection, "cycle", None) is not None and not _is_asking(connection):
                connection.shutdown()

    async def _idle_in_time(self) -> bool:
        """Wait for the last request; False when the limit passes or a second signal comes before."""
        deadline = time.monotonic() + self._drain_seconds
        while self._unfinished:
            if time.monotonic() >= deadline or len(self._signals) > 1:
                return False
            await asyncio.sleep(POLL_SECONDS)
        return True

    @property
    def _unfinished(self) -> int:
        """Requests that are being answered, and those of which a part has come."""
        return self._service.active + sum(map(_is_asking, self.server_state.connections))


def _is_asking(connection: object) -> bool:
    """Whether a request's head is half received: uvicorn makes a scope as it begins, a cycle as it ends."""
    cycle = getattr(connection, "cycle", None)
    return getattr(connection, "scope", None) is not (cycle.scope if cycle else None)
