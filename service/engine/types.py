"""What crosses the engine's border: requests in, token events and statistics out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop. The door has filled every default in."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off; comes from generation_config.json
    repetition_penalty: float = 1.0  # 1: off; comes from generation_config.json
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()  # the model's end-of-text list
    seed: int | None = None  # None: a fresh one for each request


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as token ids. Its length has been checked against the context at the door."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One step of one request.

    `text` is what may be shown now: never half a character, never a part of a stop string; it is "" while
    either is undecided. The last event has `finish_reason` and carries what was held back.
    """

    text: str
    token_id: int | None  # None on an event that only flushes text
    completion_tokens: int  # so far, this token included
    finish_reason: str | None = None  # "stop" | "length"


class EngineError(Exception):
    """The base of what an engine answers instead of tokens."""


class QueueFull(EngineError):
    """As many requests wait as may: try again after `retry_after_s`."""

    def __init__(self, waiting: int, limit: int, retry_after_s: float) -> None:
        self.waiting, self.limit, self.retry_after_s = waiting, limit, retry_after_s
        super().__init__(
            f"{waiting} requests are waiting and the limit is {limit}; retry in {retry_after_s:.0f} s"
        )


class RequestTooLong(EngineError):
    """The prompt and the tokens asked for do not fit the KV cache that was planned."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        self.prompt_tokens, self.context = prompt_tokens, context
        super().__init__(f"the prompt has {prompt_tokens} tokens and the context is {context}")


class EngineDead(EngineError):
    """The engine's thread has ended; no request will ever be answered by it."""


class StepFailed(EngineError):
    """A step of this request raised; the request is lost, the engine goes on."""


class DeviceLost(EngineError):
    """What a runner raises when its device answers nothing any more: no later step can succeed."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Prometheus' form: cumulative-ready counts per upper bound, the last one being +Inf."""

    bounds: tuple[float, ...]  # seconds, without +Inf
    counts: tuple[int, ...]  # per bucket, not cumulative; len(bounds) + 1
    total: float  # sum of the observations, seconds


@dataclass(frozen=True)
class EngineStats:
    """A consistent picture of the engine, cheap enough to take on every scrape."""

    alive: bool
    running: int
    waiting: int
    waiting_limit: int
    context: int
    kv_tokens_used: int
    kv_tokens_total: int
    prompt_tokens: int  # counters, since start
    generation_tokens: int
    finished: dict[str, int] = field(default_factory=dict)  # by reason: stop, length, cancelled, error
    rejected: int = 0
    time_to_first_token: Histogram | None = None
    inter_token_latency: Histogram | None = None
    e2e_latency: Histogram | None = None
    queue_time: Histogram | None = None


class Engine(Protocol):
    """Three methods, so that another engine is a new file and not a rewrite."""

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Queue a request and yield its events.

        Raises QueueFull, RequestTooLong or EngineDead on the first `anext`, StepFailed or EngineDead later.
        Closing the generator (`aclose`, or leaving the loop) aborts the request before the next step.
        """
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stop the thread; what still runs ends with EngineDead. Idempotent."""
        ...
