"""What each parameter of a chat request means here: honoured, accepted where it changes nothing, or refused.

`service.api.schemas` has those that are honoured, with their limits. One that OpenAI publishes and that is
not supported yet is accepted at its no-op value and refused by name at any other. One that nobody knows is
accepted and named in the `x-snugfit-ignored` header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from pydantic import ValidationError
from pydantic_core import ErrorDetails, from_json

from service.api.errors import ApiError, Unsupported
from service.api.schemas import ChatCompletionRequest

IGNORED_HEADER = "x-snugfit-ignored"
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
    "function_call": _only("none", "auto"),
    "functions": _empty(list),
    "modalities": NoOp(lambda given: given == ["text"], 'send ["text"], or leave it out'),
    "moderation": _never,
    "parallel_tool_calls": _only(True, False),  # there are no tools to call
    "prediction": _never,
    "reasoning_effort": _only("none"),
    "response_format": NoOp(
        lambda given: given == {"type": "text"}, 'send {"type": "text"}, or leave it out'
    ),
    "service_tier": _only("auto", "default"),
    "store": _only(False),
    "tool_choice": _only("none", "auto"),
    "tools": _empty(list),
    "verbosity": _only("medium"),
    "web_search_options": _never,
}
STREAM_NO_OPS: dict[str, NoOp] = {"include_obfuscation": _only(False)}

# What to do where the limit alone does not say it.
ADVICE = {  # by parameter, and pydantic's name for what is wrong with it
    ("n", "less_than_equal"): "for more answers, send several requests",
    ("top_k", "greater_than_equal"): "0 or -1 turns it off",
    ("repetition_penalty", "greater_than_equal"): "1 turns it off",
    ("repetition_penalty", "less_than_equal"): "1 turns it off",
}


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
    _refuse_contradictions(request)
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


def _refuse_unsupported(request: ChatCompletionRequest) -> None:
    _check_no_ops(request.model_extra or {}, NO_OPS)
    if request.stream_options:
        _check_no_ops(request.stream_options.model_extra or {}, STREAM_NO_OPS, "stream_options.")


def _refuse_contradictions(request: ChatCompletionRequest) -> None:
    """What is valid by itself and not beside the rest."""
    if request.stream_options and not request.stream:
        raise _contradiction("stream_options", "stream_options is only allowed when stream is true.")
    if request.top_logprobs and not request.logprobs:
        raise _contradiction("top_logprobs", "top_logprobs is only allowed when logprobs is true.")
    most = request.max_completion_tokens or request.max_tokens
    if most and (request.min_tokens or 0) > most:
        told = f"min_tokens: {request.min_tokens} is more than the {most} tokens that the answer may have"
        raise _contradiction("min_tokens", f"{told}; lower it, or raise max_completion_tokens.")


def _contradiction(param: str, message: str) -> ApiError:
    return ApiError(message, code="invalid_value", param=param)


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
    advice = ADVICE.get((param, first["type"]))
    message = f"{param}: {_lower_first(first['msg'])}"
    return ApiError(f"{message}; {advice}" if advice else message, code=code, param=param)


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
