"""Puts the service together: settings and a way to load a model in, an ASGI application out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from loader.plan import Plan
from loader.usage import version
from service import logs
from service.api import chat, health, models
from service.api.auth import ApiKeys
from service.api.errors import answer
from service.api.middleware import REQUEST_ID, BodyLimit, ErrorBoundary, Gate, RequestId
from service.api.params import IGNORED_HEADER
from service.backend import Backend, Progress
from service.exemplars import Exemplars
from service.lifecycle import Service, Start
from service.metrics.collector import Metrics
from service.planning import served_name
from service.settings import Settings
from service.tracing import RequestSpans, Tracing

EXPOSED_HEADERS = (REQUEST_ID, IGNORED_HEADER, "retry-after", "retry-after-ms")


def create_app(
    settings: Settings, start: Start, plan: Plan | None = None, tracing: Tracing | None = None
) -> FastAPI:
    """The application; `start` loads the model on a thread once the application runs.

    `app.state.service` is its Service. `plan` is for /metrics, which shows it while loading too. `tracing` is
    closed with the application.
    """
    name = served_name(settings)
    exemplars = Exemplars() if settings.exemplars == "on" else None
    service = Service(name, _traced(start, tracing, name, exemplars) if tracing else start, plan)
    metrics = Metrics(service, version(), settings.vllm_metrics == "on", exemplars)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        asyncio.get_running_loop().set_exception_handler(logs.loop_error)
        async with AsyncExitStack() as opened:
            if tracing:
                opened.push_async_callback(tracing.close)
            opened.callback(metrics.close)
            opened.push_async_callback(service.close)
            service.load_in_background()
            yield

    app = FastAPI(
        title="snugfit",
        version=version(),
        lifespan=lifespan,
        middleware=_middleware(settings, service, tracing),
        docs_url=None,  # its page takes scripts from the network
        redoc_url=None,
        # Its own telemetry would send exceptions with their messages, which may quote prompts.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )
    app.state.service, app.state.settings, app.state.metrics = service, settings, metrics
    app.add_exception_handler(HTTPException, _router_refusal)
    for router in (chat.router, models.router, health.router):
        app.include_router(router)
    return app


def _traced(start: Start, tracing: Tracing, name: str, exemplars: Exemplars | None) -> Start:
    """`start`, with an engine whose answers are spans."""

    def begin(progress: Progress) -> Backend:
        backend = start(progress)
        return replace(backend, engine=tracing.engine(backend.engine, name, exemplars))

    return begin


def _middleware(settings: Settings, service: Service, tracing: Tracing | None) -> list[Middleware]:
    """From the outside in. CORS stands outside of the errors: a browser hides those that come without it."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
    return [
        *([Middleware(RequestSpans, tracing=tracing)] if tracing else []),
        Middleware(RequestId, service=service),
        *([cors] if settings.cors_origins else []),
        Middleware(ErrorBoundary),
        Middleware(ApiKeys, keys=settings.api_keys),
        Middleware(BodyLimit, limit_bytes=settings.max_body_bytes),
        Middleware(Gate, service=service),
    ]


async def _router_refusal(_request: Request, err: Exception) -> Response:
    """No such path, no such method: in OpenAI's shape as well."""
    return answer(err).response()
