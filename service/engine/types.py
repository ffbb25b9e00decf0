"""What crosses the engine's border: requests in, token events and statistics out."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop. The door has filled every default in.

    Scores are changed in this order: logit_bias, min_tokens, repetition, presence and frequency penalties;
    then temperature, top_k, top_p, min_p.
    """

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0  # tokens less likely than this share of the likeliest are left out; 0: off
    repetition_penalty: float = 1.0  # of tokens in prompt and answer; 1: off
    presence_penalty: float = 0.0  # of tokens in the answer, once
    frequency_penalty: float = 0.0  # of tokens in the answer, each time
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its score
    seed: int | None = None  # None: a fresh one for each request
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()  # that end the answer; ignore_eos has left the model's out
    min_tokens: int = 0  # until then stop_token_ids cannot be chosen, and stop strings do not end
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: and of the n likeliest


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, as token ids. Its length has been checked against the context at the door."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Natural logarithms of probabilities, after penalties and bias and before temperature and top_*."""

    chosen: float
    top: tuple[tuple[int, float], ...] = ()  # token id, logprob; the likeliest first


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
    logprobs: Logprobs | None = None
    cached_tokens: int = 0  # of the prompt, that were in the KV pool and not computed again
    queued_s: float = 0.0  # that the request waited before its first step


class EngineError(Exception):
    """The base of what an engine answers instead of tokens."""


class QueueFull(EngineError):
    """As many requests wait as may: try again after `retry_after_s`."""

    def __init__(self, waiting: int, limit: int, retry_after_s: float) -> None:
        self.waiting, self.limit, self.retry_after_s = waiting, limit, retry_after_s
        super().__init__(
            f"{waiting} requests are waiting and the limit is {limit}; retry in {retry_after_s:.0f} s"
        )


class WaitedTooLong(EngineError):
    """The request was not started within the time that one may wait: the server has too much to do."""

    def __init__(self, waited_s: float, retry_after_s: float) -> None:
        self.waited_s, self.retry_after_s = waited_s, retry_after_s
        super().__init__(
            f"the request waited {waited_s:.0f} s and was not started; retry in {retry_after_s:.0f} s"
        )


class RequestTooLong(EngineError):
    """The prompt leaves no room for an answer in the context that was planned."""

    def __init__(self, prompt_tokens: int, context: int) -> None:
        self.prompt_tokens, self.context = prompt_tokens, context
        super().__init__(f"the prompt has {prompt_tokens} tokens and the context is {context}")


class UnknownToken(EngineError):
    """The prompt has a token that the model has no embedding for; some tokenizers know more than theirs."""

    def __init__(self, token_id: int, vocab: int) -> None:
        self.token_id, self.vocab = token_id, vocab
        super().__init__(f"the prompt has token {token_id}, and the model knows tokens 0 to {vocab - 1}")


class EngineDead(EngineError):
    """The engine's thread has ended; no request will ever be answered by it."""


class StepFailed(EngineError):
    """A step of this request raised; the request is lost, the engine goes on."""


class DeviceLost(EngineError):
    """What a runner raises when its device answers nothing any more: no later step can succeed."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """Prometheus' form: cumulative-ready counts per upper bound, the last one being +Inf."""

    bounds: tuple[float, ...]  # without +Inf; seconds, but for batch_size
    counts: tuple[int, ...]  # per bucket, not cumulative; len(bounds) + 1
    total: float  # sum of the observations


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
    timed_out: int = 0  # waited longer than a request may
    kv_blocks_used: int = 0  # held by requests; what only prefix reuse keeps is free
    kv_blocks_total: int = 0
    preemptions: int = 0
    prefix_queries: int = 0  # prompt tokens looked up in the pool, and
    prefix_hits: int = 0  # those of them that were there
    steps: int = 0
    out_of_memory: int = 0  # steps that were tried again, mostly with less
    batch_size: Histogram | None = None  # rows of a step
    step_time: Histogram | None = None  # seconds, the host's work included
    time_to_first_token: Histogram | None = None
    inter_token_latency: Histogram | None = None
    e2e_latency: Histogram | None = None
    queue_time: Histogram | None = None


class Engine(Protocol):
    """Three methods, so that another engine is a new file and not a rewrite."""

    def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        """Queue a request and yield its events.

        Raises QueueFull, RequestTooLong, UnknownToken or EngineDead on the first `anext`, WaitedTooLong,
        StepFailed or EngineDead later.
        Closing the generator (`aclose`, or leaving the loop) aborts the request before the next step.
        """
        ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None:
        """Stop the thread; what still runs ends with EngineDead. Idempotent."""
        ...
