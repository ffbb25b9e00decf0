"""Probes: /health is whether the process is worth keeping, /ready whether to send it requests, /metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api.errors import retry_after
from service.api.schemas import Health, Readiness
from service.lifecycle import Loading, Service
from service.metrics.collector import Metrics

router = APIRouter()


@router.head("/health", include_in_schema=False)  # some load balancers probe with HEAD
@router.get("/health", responses={503: {"model": Health}})
async def health(http: Request, response: Response) -> Health:
    """503 only when a restart is the cure: the engine is dead, or loading failed."""
    service: Service = http.app.state.service
    dead = service.error is not None or (service.loaded is not None and not service.engine_alive)
    dead = dead and not service.draining  # it ends by itself
    response.status_code = 503 if dead else 200
    return Health(status="dead" if dead else "ok")


@router.head("/ready", include_in_schema=False)
@router.get("/ready", responses={503: {"model": Readiness}}, response_model_exclude_unset=True)
async def ready(http: Request, response: Response) -> Readiness:
    service: Service = http.app.state.service
    if service.ready:
        return Readiness(status="ready", model=service.name)
    response.status_code = 503
    response.headers.update(retry_after(Loading.retry_after_s))
    return _not_ready(service)


@router.get("/metrics", include_in_schema=False)
async def metrics(http: Request) -> Response:
    """On a thread: NVML may take milliseconds, and streams should not feel a scrape."""
    exporter: Metrics = http.app.state.metrics
    body, content_type = await asyncio.to_thread(exporter.expose, http.headers.get("accept", ""))
    return Response(body, headers={"content-type": content_type})


def _not_ready(service: Service) -> Readiness:
    if service.error:
        return Readiness(status="failed", model=service.name, error=str(service.error))
    if service.draining:
        return Readiness(status="draining", model=service.name)
    if service.loaded is None:
        return Readiness(status="loading", model=service.name, progress=service.progress.state.as_dict())
    return Readiness(status="dead", model=service.name)
