"""Puts the service together: settings and a way to load a model in, an ASGI application out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from loader.plan import Plan
from loader.usage import version
from service.api import chat, health, models
from service.api.auth import ApiKeys
from service.api.errors import answer
from service.api.middleware import REQUEST_ID, BodyLimit, ErrorBoundary, Gate, RequestId
from service.api.params import IGNORED_HEADER
from service.lifecycle import Service, Start
from service.metrics import Metrics
from service.planning import served_name
from service.settings import Settings

EXPOSED_HEADERS = (REQUEST_ID, IGNORED_HEADER, "retry-after", "retry-after-ms")


def create_app(settings: Settings, start: Start, plan: Plan | None = None) -> FastAPI:
    """The application; `start` loads the model on a thread once the application runs.

    `app.state.service` is its Service. `plan` is for /metrics, which shows it while loading too.
    """
    service = Service(served_name(settings), start, plan)
    metrics = Metrics(service, version())

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.load_in_background()
        yield
        await service.close()
        metrics.close()

    app = FastAPI(
        title="snugfit",
        version=version(),
        lifespan=lifespan,
        middleware=_middleware(settings, service),
        docs_url=None,  # its page takes scripts from the network
        redoc_url=None,
    )
    app.state.service, app.state.settings, app.state.metrics = service, settings, metrics
    app.add_exception_handler(HTTPException, _router_refusal)
    for router in (chat.router, models.router, health.router):
        app.include_router(router)
    return app


def _middleware(settings: Settings, service: Service) -> list[Middleware]:
    """From the outside in. CORS stands outside of the errors: a browser hides those that come without it."""
    cors = Middleware(
        CORSMiddleware,
        allow_origins=list(settings.cors_origins),
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
    )
    return [
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
