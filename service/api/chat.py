"""POST /v1/chat/completions: a conversation in, an answer out, as one JSON object or as a stream."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from service.api import errors, logprobs, messages, params, schemas, sse
from service.api.choices import Events, together
from service.api.chunks import Chunks
from service.api.connection import while_connected
from service.api.docs import CHAT_DOCS
from service.api.sampling import for_choices, sampling
from service.backend import Backend, Template, Tokens
from service.engine import types as engine
from service.lifecycle import Service

LARGE_BODY_BYTES = 64_000
# Encoded in hardly more time than it takes to have a thread do it; a turn counts as some more of them.
SHORT_PROMPT_CHARACTERS, TURN_CHARACTERS = 1_000, 50

router = APIRouter()


@dataclass(frozen=True)
class Job:
    """One accepted request on its way through the engine."""

    id: str
    created: int
    model: str
    prompt_tokens: int
    include_usage: bool
    tokens: Tokens
    answers: list[Events]  # of which none has begun

    def usage(self, ends: list[Answer]) -> schemas.Usage:
        """The prompt counts once, and so does what was cached of it: the first answer tells."""
        completion_tokens = sum(answer.tokens for answer in ends)
        return schemas.Usage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=self.prompt_tokens + completion_tokens,
            prompt_tokens_details=schemas.PromptTokensDetails(cached_tokens=ends[0].cached_tokens),
        )


@dataclass
class Answer:
    """What is known of one answer so far."""

    tokens: int = 0
    cached_tokens: int = 0
    finish_reason: str = ""
    text: list[str] = field(default_factory=list)
    logprobs: list[schemas.TokenLogprob] | None = None

    def note(self, event: engine.TokenEvent) -> None:
        self.tokens = event.completion_tokens
        self.cached_tokens = max(self.cached_tokens, event.cached_tokens)
        self.finish_reason = event.finish_reason or ""

    def keep(self, text: str, entry: schemas.TokenLogprob | None) -> None:
        self.text.append(text)
        if entry:
            self.logprobs = self.logprobs or []
            self.logprobs.append(entry)


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
    """Messages to ids, then the engine's generator, which queues the request on its first step."""
    turns = messages.plain(request.messages)
    if (least_tokens := backend.template.least_tokens(turns)) >= backend.context:
        raise engine.RequestTooLong(least_tokens, backend.context)
    prompt_ids = await _encode(backend.template, turns)
    tokens = backend.template.tokens
    first = sampling(request, backend.defaults, len(prompt_ids), backend.context, tokens.count)
    id_ = f"chatcmpl-{uuid4().hex}"
    answers = [
        backend.engine.generate(engine.Request(f"{id_}-{index}" if index else id_, prompt_ids, each))
        for index, each in enumerate(for_choices(first, request.n or 1))
    ]
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return Job(id_, int(time.time()), model, len(prompt_ids), include_usage, tokens, answers)


async def _encode(template: Template, turns: list[dict[str, str]]) -> tuple[int, ...]:
    """On a thread if it is long, because it would hold up every other stream."""
    if sum(TURN_CHARACTERS + len(turn["content"]) for turn in turns) <= SHORT_PROMPT_CHARACTERS:
        return template.encode(turns)
    return await asyncio.to_thread(template.encode, turns)


async def _complete(job: Job) -> schemas.ChatCompletion:
    answers = [Answer() for _ in job.answers]
    async with aclosing(together(job.answers)) as batches:
        async for came in batches:
            for index, event in came:
                answers[index].note(event)
                answers[index].keep(event.text, logprobs.of_event(event, job.tokens))
    return schemas.ChatCompletion(
        id=job.id,
        created=job.created,
        model=job.model,
        choices=[_choice(index, answer) for index, answer in enumerate(answers)],
        usage=job.usage(answers),
    )


def _choice(index: int, answer: Answer) -> schemas.Choice:
    return schemas.Choice(
        index=index,
        message=schemas.AssistantMessage(content="".join(answer.text)),
        logprobs=logprobs.content(answer.logprobs) if answer.logprobs else None,
        finish_reason=answer.finish_reason,
    )


async def _frames(job: Job) -> AsyncGenerator[bytes, None]:
    """Of each answer the role first, then a chunk for each token that shows text or has logprobs, and the
    reason of the end; then the usage if asked for, and [DONE]. What comes together is given out together."""
    chunks = Chunks(job.id, job.created, job.model, job.include_usage)
    answers = [Answer() for _ in job.answers]
    async with aclosing(together(job.answers)) as batches:
        async for came in batches:
            frames = [_of_event(job, chunks, answers[index], index, event) for index, event in came]
            if data := b"".join(frames):
                yield data
    usage = chunks.usage(job.usage(answers)) if job.include_usage else b""
    yield usage + sse.DONE


def _of_event(job: Job, chunks: Chunks, answer: Answer, index: int, event: engine.TokenEvent) -> bytes:
    """The chunks of one event: none, while its text is held back and no logprobs are wanted."""
    data = b"" if answer.tokens else chunks.role(index)
    answer.note(event)
    if event.logprobs and (entry := logprobs.of_event(event, job.tokens)):
        data += chunks.text(index, event.text, logprobs.content([entry]))
    elif event.text:
        data += chunks.text(index, event.text)
    return data + chunks.end(index, event.finish_reason) if event.finish_reason else data
