"""POST /v1/chat/completions: a conversation in, an answer out, as one JSON object or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api import errors, messages, params, schemas, sse
from service.api.connection import while_connected
from service.api.docs import CHAT_DOCS
from service.backend import Backend
from service.engine import types as engine
from service.lifecycle import Service

LARGE_BODY_BYTES = 64_000

router = APIRouter()


@dataclass(frozen=True)
class Job:
    """One accepted request on its way through the engine."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    include_usage: bool
    events: AsyncGenerator[engine.TokenEvent, None]

    def usage(self, completion_tokens: int) -> schemas.Usage:
        return schemas.Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
        )


@router.post("/v1/chat/completions", **CHAT_DOCS)
async def create(http: Request) -> Response:
    service: Service = http.app.state.service
    backend = service.backend()
    request = await _read(http)
    if request.model != service.name:
        raise errors.UnknownModel(request.model, service.name)
    job = await _submit(request, backend, service.name)
    headers = params.ignored(request)
    if request.stream:
        return sse.EventStream(_frames(job), http.app.state.settings.keep_alive_seconds, headers)
    completion = await while_connected(_complete(job), http.receive)
    return Response(completion.model_dump_json(), headers=headers, media_type="application/json")


async def _read(http: Request) -> schemas.ChatCompletionRequest:
    """The parsed body. A large one is parsed on a thread, because it would hold up every stream."""
    content_type = http.headers.get("content-type", "")
    if content_type and content_type.partition(";")[0].strip().lower() != "application/json":
        raise errors.NotJson(content_type)
    raw = await http.body()
    return await asyncio.to_thread(params.parse, raw) if len(raw) > LARGE_BODY_BYTES else params.parse(raw)


async def _submit(request: schemas.ChatCompletionRequest, backend: Backend, model: str) -> Job:
    """Messages to ids, on a thread because a long prompt would hold up every other stream; then the engine's
    generator, which queues the request on its first step."""
    turns = messages.plain(request.messages)
    if (least_tokens := backend.template.least_tokens(turns)) >= backend.context:
        raise engine.RequestTooLong(least_tokens, backend.context)
    prompt_ids = await asyncio.to_thread(backend.template.encode, turns)
    sampling = params.sampling(request, backend.defaults, len(prompt_ids), backend.context)
    id_ = f"chatcmpl-{uuid4().hex}"
    events = backend.engine.generate(engine.Request(id_, prompt_ids, sampling))
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return Job(id_, int(time.time()), model, len(prompt_ids), include_usage, events)


async def _complete(job: Job) -> schemas.ChatCompletion:
    text: list[str] = []
    last = None
    async with aclosing(job.events) as events:
        async for last in events:
            text.append(last.text)
    reason, completion_tokens = _end(last)
    message = schemas.AssistantMessage(content="".join(text))
    choice = schemas.Choice(message=message, finish_reason=reason)
    return schemas.ChatCompletion(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=[choice],
        usage=job.usage(completion_tokens),
    )


async def _frames(job: Job) -> AsyncGenerator[bytes, None]:
    """The role first, then text as it comes, the reason of the end, the usage if asked for, and [DONE]."""
    last = None
    async with aclosing(job.events) as events:
        async for event in events:
            if last is None:
                yield _chunk(job, schemas.Delta(role="assistant", content=""))
            if event.text:
                yield _chunk(job, schemas.Delta(content=event.text))
            last = event
    reason, completion_tokens = _end(last)
    yield _chunk(job, schemas.Delta(), reason)
    if job.include_usage:
        yield _frame(job, [], job.usage(completion_tokens))
    yield sse.DONE


def _end(last: engine.TokenEvent | None) -> tuple[str, int]:
    """The reason of the end and the tokens generated. An answer cut short must not look like a whole one."""
    if last is None or last.finish_reason is None:
        raise engine.StepFailed("the engine ended the answer without a reason")
    return last.finish_reason, last.completion_tokens


def _chunk(job: Job, delta: schemas.Delta, finish_reason: str | None = None) -> bytes:
    choice = schemas.ChunkChoice(index=0, delta=delta, logprobs=None, finish_reason=finish_reason)
    return _frame(job, [choice], None)


def _frame(job: Job, choices: list[schemas.ChunkChoice], usage: schemas.Usage | None) -> bytes:
    """With usage asked for, every chunk has the key: null but for the last."""
    chunk = schemas.ChatCompletionChunk(
        id=job.id, object="chat.completion.chunk", created=job.created, model=job.model, choices=choices
    )
    if job.include_usage:
        chunk.usage = usage
    return sse.frame(chunk.model_dump_json(exclude_unset=True).encode())
