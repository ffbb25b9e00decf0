"""From a request's parameters to the engine's: defaults filled in, ids checked, a seed for each choice."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256

from service.api.errors import ApiError
from service.api.schemas import ChatCompletionRequest
from service.engine.types import RequestTooLong, SamplingParams
from service.prompt.defaults import GenerationDefaults

GREEDY_BELOW = 1e-5  # a smaller temperature is 0 in float32 divisions; vLLM draws the line here, too


def sampling(
    request: ChatCompletionRequest,
    defaults: GenerationDefaults,
    prompt_tokens: int,
    context: int,
    vocabulary: int,
) -> SamplingParams:
    """The request's own values over the model's. `max_tokens` is cut to what is left of the context.

    `vocabulary` is how many token ids there are. Raises RequestTooLong when the prompt leaves no room for an
    answer, ApiError (400) for a token id that does not exist, or when min_tokens leaves no token to choose.
    """
    left = context - prompt_tokens
    if left < 1:
        raise RequestTooLong(prompt_tokens, context)
    max_tokens = min(request.max_completion_tokens or request.max_tokens or left, left)
    top_p = _or(request.top_p, defaults.top_p)
    temperature = _or(request.temperature, defaults.temperature)
    nucleus = top_p > 0  # or else: of nothing but the likeliest token, which is greedy
    stop_token_ids = _stop_token_ids(request, defaults, vocabulary)
    if request.min_tokens and len(stop_token_ids) >= vocabulary:
        raise ApiError(
            "stop_token_ids: with min_tokens, at least one token must not stop; leave one out.",
            code="invalid_value",
            param="stop_token_ids",
        )
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature if nucleus and temperature >= GREEDY_BELOW else 0.0,
        top_p=top_p if nucleus else 1.0,
        top_k=max(0, defaults.top_k if request.top_k is None else request.top_k),
        min_p=_or(request.min_p, defaults.min_p),
        repetition_penalty=_or(request.repetition_penalty, defaults.repetition_penalty),
        presence_penalty=_or(request.presence_penalty, defaults.presence_penalty),
        frequency_penalty=_or(request.frequency_penalty, defaults.frequency_penalty),
        logit_bias=_logit_bias(request, vocabulary),
        seed=request.seed,
        stop=tuple(request.stop or ()),
        stop_token_ids=stop_token_ids,
        min_tokens=min(request.min_tokens or 0, max_tokens),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def for_choices(params: SamplingParams, n: int) -> list[SamplingParams]:
    """One for each of n answers. The first has the request's own seed, so that it is the answer to n=1."""
    if params.seed is None:
        return [params] * n
    return [params, *(replace(params, seed=_derived(params.seed, index)) for index in range(1, n))]


def _derived(seed: int, index: int) -> int:
    """A seed for another choice, int64 as a client's. Hashed: seed + 1 is what the next request may have."""
    return int.from_bytes(sha256(f"{seed}/{index}".encode()).digest()[:8], "big", signed=True)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _logit_bias(request: ChatCompletionRequest, vocabulary: int) -> tuple[tuple[int, float], ...]:
    """JSON has only text for keys, so the token ids are read from it."""
    biases: dict[int, float] = {}
    for key, bias in (request.logit_bias or {}).items():
        path = f"logit_bias.{key[:20]}"
        if not (key.isascii() and key.isdecimal() and len(key) <= len(str(vocabulary))):
            raise _no_token(path, key[:20], vocabulary)
        biases[int(key)] = bias
        _check_id(int(key), path, vocabulary)
    return tuple(biases.items())


def _stop_token_ids(
    request: ChatCompletionRequest, defaults: GenerationDefaults, vocabulary: int
) -> frozenset[int]:
    """The request's and, unless it ignores them, the model's."""
    given = request.stop_token_ids or []
    for at, id_ in enumerate(given):
        _check_id(id_, f"stop_token_ids.{at}", vocabulary)
    model: Iterable[int] = () if request.ignore_eos else defaults.stop_token_ids
    return frozenset({*given, *model})


def _check_id(token_id: int, path: str, vocabulary: int) -> None:
    if not 0 <= token_id < vocabulary:
        raise _no_token(path, token_id, vocabulary)


def _no_token(path: str, given: object, vocabulary: int) -> ApiError:
    return ApiError(
        f"{path}: {given!r} is no token id of this model; send ids from 0 to {vocabulary - 1}.",
        code="invalid_value",
        param=path,
    )
