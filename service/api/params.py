"""What each parameter of a chat request means here: honoured, accepted where it changes nothing, or refused.

A parameter that OpenAI publishes and that is not supported yet is accepted at its no-op value and refused by
name at any other. One that nobody knows is accepted and named in the `x-snugfit-ignored` header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from service.api.errors import ApiError, Unsupported
from service.api.schemas import ChatCompletionRequest
from service.engine.types import RequestTooLong, SamplingParams
from service.prompt.defaults import GenerationDefaults

IGNORED_HEADER = "x-snugfit-ignored"
GREEDY_BELOW = 1e-5  # a smaller temperature is 0 in float32 divisions; vLLM draws the line here, too
IGNORED_LIMIT = 1000  # characters: a header that proxies still pass


class NoOp(NamedTuple):
    """When a parameter changes nothing, and what to send instead of anything else."""

    holds: Callable[[Any], bool]
    instead: str


def _only(*values: object) -> NoOp:
    """Accepted at these values; True is not 1 here."""
    known = {(isinstance(value, bool), value) for value in values}
    words = " or ".join(repr(value).lower() for value in values)
    return NoOp(
        lambda given: isinstance(given, str | int | float) and (isinstance(given, bool), given) in known,
        f"send {words}, or leave it out",
    )


def _empty(kind: type) -> NoOp:
    return NoOp(lambda given: given == kind(), f"send {kind()}, or leave it out")


_never = NoOp(lambda _given: False, "leave it out")

# From CreateChatCompletionRequest of the published API, less what is honoured. Null is unset.
# Not listed are metadata, prompt_cache_key, prompt_cache_options, prompt_cache_retention, safety_identifier:
# they are for OpenAI's own cache and bookkeeping and change no answer, so they are treated as unknown.
NO_OPS: dict[str, NoOp] = {
    "audio": _never,
    "frequency_penalty": _only(0),
    "function_call": _only("none", "auto"),
    "functions": _empty(list),
    "logit_bias": _empty(dict),
    "logprobs": _only(False),
    "modalities": NoOp(lambda given: given == ["text"], 'send ["text"], or leave it out'),
    "moderation": _never,
    "n": _only(1),
    "parallel_tool_calls": _only(True, False),  # there are no tools to call
    "prediction": _never,
    "presence_penalty": _only(0),
    "reasoning_effort": _only("none"),
    "response_format": NoOp(
        lambda given: given == {"type": "text"}, 'send {"type": "text"}, or leave it out'
    ),
    "service_tier": _only("auto", "default"),
    "store": _only(False),
    "tool_choice": _only("none", "auto"),
    "tools": _empty(list),
    "top_logprobs": _only(0),
    "verbosity": _only("medium"),
    "web_search_options": _never,
}
STREAM_NO_OPS: dict[str, NoOp] = {"include_obfuscation": _only(False)}


def parse(raw: bytes) -> ChatCompletionRequest:
    """A request body. Raises ApiError (400) that names the first thing that is wrong with it."""
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as err:
        raise ApiError(f"The body is not JSON: {err}", code="invalid_json") from None
    if not isinstance(body, dict):
        raise ApiError("The body must be a JSON object.", code="invalid_type")
    given = {name: value for name, value in body.items() if value is not None}
    try:
        request = ChatCompletionRequest.model_validate(given)
    except ValidationError as err:
        raise _invalid(err, given) from None
    _refuse_unsupported(request)
    return request


def ignored(request: ChatCompletionRequest) -> dict[str, str]:
    """The response header that names what was accepted and had no effect; empty when there is nothing."""
    names = [quote(name, safe=".*[]$-_") for name in dict.fromkeys(_ignored_names(request))]
    if not names:
        return {}
    kept: list[str] = []
    while names and sum(map(len, kept)) + len(kept) + len(names[0]) <= IGNORED_LIMIT:
        kept.append(names.pop(0))
    return {IGNORED_HEADER: ", ".join([*kept, f"and {len(names)} more"] if names else kept)}


def sampling(
    request: ChatCompletionRequest, defaults: GenerationDefaults, prompt_tokens: int, context: int
) -> SamplingParams:
    """The request's own values over the model's. `max_tokens` is cut to what is left of the context.

    Raises RequestTooLong when the prompt leaves no room for an answer.
    """
    left = context - prompt_tokens
    if left < 1:
        raise RequestTooLong(prompt_tokens, context)
    asked = request.max_completion_tokens or request.max_tokens or left
    top_p = _or(request.top_p, defaults.top_p)
    temperature = _or(request.temperature, defaults.temperature)
    nucleus = top_p > 0  # or else: of nothing but the likeliest token, which is greedy
    return SamplingParams(
        max_tokens=min(asked, left),
        temperature=temperature if nucleus and temperature >= GREEDY_BELOW else 0.0,
        top_p=top_p if nucleus else 1.0,
        top_k=defaults.top_k,
        repetition_penalty=defaults.repetition_penalty,
        stop=tuple(request.stop or ()),
        stop_token_ids=defaults.stop_token_ids,
        seed=request.seed,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _refuse_unsupported(request: ChatCompletionRequest) -> None:
    _check_no_ops(request.model_extra or {}, NO_OPS)
    if request.stream_options is None:
        return
    if not request.stream:
        raise ApiError(
            "stream_options is only allowed when stream is true.",
            code="invalid_value",
            param="stream_options",
        )
    _check_no_ops(request.stream_options.model_extra or {}, STREAM_NO_OPS, "stream_options.")


def _check_no_ops(extra: Mapping[str, Any], table: Mapping[str, NoOp], prefix: str = "") -> None:
    for name, value in extra.items():
        no_op = table.get(name)
        if no_op and value is not None and not no_op.holds(value):
            raise Unsupported(prefix + name, no_op.instead)


def _ignored_names(request: ChatCompletionRequest) -> Iterator[str]:
    """Paths of keys without effect; for messages without the index, since a history repeats them."""
    yield from _unknown(request.model_extra, NO_OPS)
    if request.stream_options:
        yield from (
            f"stream_options.{key}" for key in _unknown(request.stream_options.model_extra, STREAM_NO_OPS)
        )
    for message in request.messages:
        yield from (f"messages.*.{key}" for key in _unknown(message.model_extra))
        for part in message.content if isinstance(message.content, list) else ():
            yield from (f"messages.*.content.*.{key}" for key in _unknown(part.model_extra))


def _unknown(extra: Mapping[str, Any] | None, known: Iterable[str] = ()) -> list[str]:
    return [name for name, value in (extra or {}).items() if name not in known and value is not None]


def _invalid(err: ValidationError, body: Mapping[str, Any]) -> ApiError:
    """The deepest complaint, with its path in the body. Of a union, that is the branch that was meant."""
    details = err.errors(include_url=False, include_context=False, include_input=False)
    first = max(details, key=lambda detail: (len(_path(detail, body)), not _wrong_type(detail)))
    param = ".".join(map(str, _path(first, body)))
    if first["type"] == "missing":
        return ApiError(f"{param}: is required", code="missing_required_parameter", param=param)
    code = "invalid_type" if _wrong_type(first) else "invalid_value"
    return ApiError(f"{param}: {_lower_first(first['msg'])}", code=code, param=param)


def _wrong_type(detail: ErrorDetails) -> bool:
    return detail["type"].endswith("_type")


def _path(detail: ErrorDetails, body: Any) -> list[str | int]:
    """pydantic's location without the names of union branches, which are in no body."""
    path: list[str | int] = []
    for step in detail["loc"]:
        if isinstance(body, dict) and (step in body or detail["type"] == "missing"):
            path.append(step)
            body = body.get(str(step))
        elif isinstance(body, list) and isinstance(step, int) and step < len(body):
            path.append(step)
            body = body[step]
    return path


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
