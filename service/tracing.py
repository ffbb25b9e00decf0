"""OpenTelemetry traces of requests: the standard SDK, configured by the OTEL_… variables alone.

A request is a server span; each of its answers is a span inside, with the attributes of the GenAI semantic
conventions, and within that its time in the queue, the reading of the prompt and the generation. No span has
a prompt, an answer, a header or the message of an exception in it.

`snugfit[otel]` brings the SDK; without it only `begin` is of use, which says so.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loader.usage import UsageError, version
from service import logs
from service.api.middleware import PROBES, REQUEST_ID
from service.engine.types import Engine, EngineStats, Request, TokenEvent
from service.exemplars import Exemplars

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

INSTALL = 'OpenTelemetry\'s SDK is not installed: pip install "snugfit[otel]"'
EXPORTERS = "opentelemetry_traces_exporter"  # the group of entry points that the SDK's own packages are in
PROVIDER = "snugfit"
NANOSECONDS = 10**9
LAST_SPANS_SECONDS = 3.0  # that the end of the process waits for the collector


def begin() -> Tracing:
    """Traces as the environment says: OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_…, OTEL_TRACES_SAMPLER …

    Raises UsageError when what that needs is not installed.
    """
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise UsageError([f"--traces on: {INSTALL}"]) from None
    provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
    for name in _exporter_names():
        provider.add_span_processor(BatchSpanProcessor(_exporter(name)))
    return Tracing(provider)


def _resource() -> Any:
    """Who we are, unless OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES say it."""
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = Resource({"service.name": PROVIDER, "service.version": version()})
    return Resource.create().merge(ours).merge(OTELResourceDetector().detect())


def _exporter_names() -> list[str]:
    """The entry points that OTEL_TRACES_EXPORTER asks for; OTLP goes over HTTP unless it says otherwise."""
    asked = os.environ.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or os.environ.get(
        "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
    )
    otlp = "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"
    names = [name.strip() for name in asked.split(",")]
    return [otlp if name == "otlp" else name for name in names if name != "none"]


def _exporter(name: str) -> Any:
    found = entry_points(group=EXPORTERS, name=name)
    if not found:
        known = ", ".join(sorted({point.name for point in entry_points(group=EXPORTERS)})) or "none"
        raise UsageError([f"--traces on: the exporter {name!r} is not installed; those that are: {known}"])
    return next(iter(found)).load()()


class Tracing:
    """The spans of one service, and who makes them."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self.tracer: Tracer = provider.get_tracer(PROVIDER, version())

    def engine(self, engine: Engine, model: str, exemplars: Exemplars | None) -> TracedEngine:
        return TracedEngine(engine, self.tracer, model, exemplars)

    async def close(self) -> None:
        """Send what was not sent. A collector that does not answer is not waited for long: the SDK would."""
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        await asyncio.to_thread(last.join, LAST_SPANS_SECONDS)


class RequestSpans:
    """ASGI middleware, outside of all the others: a server span for each request but the probes'."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app, self._tracer = app, tracing.tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            return await self._app(scope, receive, send)
        from opentelemetry.trace import use_span

        span = _server_span(self._tracer, scope)
        logs.trace_id.set(_trace_id(span))

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                _answered(span, message)
            await send(message)

        # What is raised is not recorded: its message may quote the request.
        with use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                await self._app(scope, receive, watched)
            except BaseException as err:
                _failed(span, err)
                raise
            finally:
                _name_by_route(span, scope)


def _server_span(tracer: Tracer, scope: Scope) -> Span:
    """Its parent is the one that the `traceparent` header names."""
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind

    attributes = {
        "http.request.method": scope["method"],
        "url.scheme": scope["scheme"],
        "url.path": scope["path"],
        "network.protocol.version": scope["http_version"],
    }
    parent = extract(dict(Headers(scope=scope)))
    return tracer.start_span(scope["method"], context=parent, kind=SpanKind.SERVER, attributes=attributes)


def _name_by_route(span: Span, scope: Scope) -> None:
    """Known only after routing. A path that is no route of ours would make names without end."""
    if route := getattr(scope.get("route"), "path", None):
        span.update_name(f"{scope['method']} {route}")
        span.set_attribute("http.route", route)


def _answered(span: Span, message: Message) -> None:
    status = message["status"]
    span.set_attribute("http.response.status_code", status)
    if request_id := Headers(raw=message["headers"]).get(REQUEST_ID):
        span.set_attribute(f"http.response.header.{REQUEST_ID}", [request_id])
    if status >= 500:
        _fail(span, str(status))


def _failed(span: Span, err: BaseException) -> None:
    _fail(span, type(err).__name__)


def _fail(span: Span, kind: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR)


def _trace_id(span: Span) -> str:
    """ "" where there is none, as with OTEL_SDK_DISABLED."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else ""


class TracedEngine:
    """An engine whose answers are spans inside of the request's. The phases are told at the end."""

    def __init__(self, engine: Engine, tracer: Tracer, model: str, exemplars: Exemplars | None) -> None:
        self._engine, self._tracer, self._model = engine, tracer, model
        self._exemplars = exemplars

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        from opentelemetry.context import get_current

        return self._traced(request, get_current())

    async def _traced(self, request: Request, parent: Context) -> AsyncGenerator[TokenEvent, None]:
        span = self._tracer.start_span(
            f"chat {self._model}", context=parent, attributes=_asked(request, self._model)
        )
        times = _Times()
        try:
            async with aclosing(self._engine.generate(request)) as events:
                async for event in events:
                    times.note(event)
                    yield event
        except Exception as err:
            _failed(span, err)
            raise
        finally:
            self._end(span, times)

    def stats(self) -> EngineStats:
        return self._engine.stats()

    def close(self) -> None:
        self._engine.close()

    def _end(self, span: Span, times: _Times) -> None:
        """Also when the client has left in the middle."""
        from opentelemetry.trace import set_span_in_context

        if span.is_recording():
            inside = set_span_in_context(span)
            for name, begun, ended in times.phases():
                self._tracer.start_span(name, context=inside, start_time=begun).end(ended)
            span.set_attributes(times.attributes())
            self._exemplify(_trace_id(span), times)
        span.end()

    def _exemplify(self, trace_id: str, times: _Times) -> None:
        if self._exemplars and times.last and times.last.finish_reason:
            self._exemplars.note("time_to_first_token", times.first_token_s, trace_id)
            self._exemplars.note("e2e_latency", times.whole_s, trace_id)


class _Times:
    """When what happened to one answer, in nanoseconds since the epoch."""

    def __init__(self) -> None:
        self._begun = time.time_ns()
        self._first_at = self._last_at = 0
        self._queued_s = 0.0
        self.last: TokenEvent | None = None

    def note(self, event: TokenEvent) -> None:
        self._last_at = time.time_ns()
        if self.last is None:
            self._first_at, self._queued_s = self._last_at, event.queued_s
        self.last = event

    @property
    def first_token_s(self) -> float:
        return (self._first_at - self._begun) / NANOSECONDS

    @property
    def whole_s(self) -> float:
        return (self._last_at - self._begun) / NANOSECONDS

    def phases(self) -> list[tuple[str, int, int]]:
        """(name, begin, end); nothing is known of an answer that had no token."""
        if self.last is None:
            return []
        admitted = min(self._begun + int(self._queued_s * NANOSECONDS), self._first_at)
        return [
            ("queue", self._begun, admitted),
            ("prefill", admitted, self._first_at),
            ("decode", self._first_at, self._last_at),
        ]

    def attributes(self) -> Mapping[str, Any]:
        if self.last is None:
            return {}
        last = self.last
        return {
            "gen_ai.usage.output_tokens": last.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": last.cached_tokens,
            "gen_ai.response.finish_reasons": [last.finish_reason or "cancelled"],
        }


def _asked(request: Request, model: str) -> Mapping[str, Any]:
    """What the request asks for; stop strings are its text, and stay out."""
    params = request.params
    attributes: dict[str, Any] = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.response.id": request.id,
        "gen_ai.usage.input_tokens": len(request.prompt_ids),
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
    }
    return {name: value for name, value in attributes.items() if value is not None}
