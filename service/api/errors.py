"""One table: from the type of an exception to an HTTP status and OpenAI's error body.

The codes are part of the API: clients choose by them. Nothing here looks at the text of a message.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from service.api.schemas import ErrorBody, ErrorDetail
from service.engine.types import (
    EngineDead,
    EngineError,
    QueueFull,
    RequestTooLong,
    StepFailed,
    UnknownToken,
    WaitedTooLong,
)
from service.lifecycle import NotServing
from service.prompt.template import TemplateRefused

log = logging.getLogger(__name__)

INVALID = "invalid_request_error"
SERVER = "server_error"
DEAD_RETRY_S = 30.0  # about what a restart takes


class ApiError(Exception):
    """A request that is refused at the door; `param` is the path of what is wrong in it."""

    def __init__(self, message: str, *, code: str, param: str | None = None, status: int = 400) -> None:
        self.code, self.param, self.status = code, param, status
        super().__init__(message)


class UnknownModel(ApiError):
    def __init__(self, asked: str, served: str) -> None:
        super().__init__(
            f"The model {asked!r} does not exist here; this server serves {served!r}.",
            code="model_not_found",
            param="model",
            status=404,
        )


class Unsupported(ApiError):
    """A parameter that OpenAI has and this server does not honour yet."""

    def __init__(self, param: str, instead: str) -> None:
        super().__init__(
            f"{param} is not supported yet: {instead}.", code="unsupported_parameter", param=param
        )


class NotJson(ApiError):
    """A form or plain text, as any web page may send it anywhere without the browser's asking first."""

    def __init__(self, content_type: str) -> None:
        super().__init__(
            f"The Content-Type is {content_type!r}; send application/json.",
            code="unsupported_media_type",
            status=415,
        )


class BodyTooLarge(ApiError):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"The request body is larger than {limit_bytes:,} bytes.", code="request_too_large", status=413
        )


class InvalidApiKey(ApiError):
    def __init__(self) -> None:
        super().__init__(
            "Missing or wrong API key: send it as 'Authorization: Bearer KEY'.",
            code="invalid_api_key",
            status=401,
        )


class ClientGone(Exception):
    """The client closed the connection; nobody reads the answer."""


@dataclass(frozen=True)
class Answer:
    """An error as it goes over the wire."""

    status: int
    type: str
    message: str
    code: str | None
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> bytes:
        """OpenAI's error object; the specification requires all four keys."""
        detail = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)
        return ErrorBody(error=detail).model_dump_json().encode()

    def response(self) -> Response:
        return Response(self.body(), self.status, self.headers, media_type="application/json")


def retry_after(seconds: float) -> dict[str, str]:
    """Whole seconds for everyone, and the milliseconds that the OpenAI SDK prefers."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(math.ceil(seconds * 1000))}


def _api_error(err: ApiError) -> Answer:
    headers = {"www-authenticate": "Bearer"} if err.status == 401 else {}
    return Answer(err.status, INVALID, str(err), err.code, err.param, headers)


def _http(err: HTTPException) -> Answer:
    """What the router itself refuses: no such path, no such method."""
    code = HTTPStatus(err.status_code).phrase.lower().replace(" ", "_")
    kind = INVALID if err.status_code < 500 else SERVER
    return Answer(err.status_code, kind, str(err.detail), code, headers=dict(err.headers or {}))


def _too_long(err: RequestTooLong) -> Answer:
    message = (
        f"This model's maximum context length is {err.context} tokens, and your messages take "
        f"{err.prompt_tokens} tokens, which must leave room for an answer. Shorten the messages."
    )
    return Answer(400, INVALID, message, "context_length_exceeded", "messages")


def _unknown_token(err: UnknownToken) -> Answer:
    message = (
        f"Your messages contain token {err.token_id}, and the model has tokens 0 to {err.vocab - 1}: the "
        "tokenizer and the model do not belong together. Leave that part out, or tell who runs this server."
    )
    return Answer(400, INVALID, message, "unknown_token", "messages")


def _queue_full(err: QueueFull) -> Answer:
    return Answer(429, "rate_limit_error", str(err), "queue_full", headers=retry_after(err.retry_after_s))


def _waited_too_long(err: WaitedTooLong) -> Answer:
    return Answer(503, SERVER, str(err), "waited_too_long", headers=retry_after(err.retry_after_s))


def _not_serving(err: NotServing) -> Answer:
    return Answer(503, SERVER, str(err), err.code, headers=retry_after(err.retry_after_s))


def _dead(err: EngineError) -> Answer:
    return Answer(
        503, SERVER, str(err) or "the engine has ended", "engine_dead", headers=retry_after(DEAD_RETRY_S)
    )


def _template(err: TemplateRefused) -> Answer:
    message = f"The model's chat template does not take these messages: {err}"
    return Answer(400, INVALID, message, "invalid_messages", "messages")


def _gone(_err: Exception) -> Answer:
    """499 is nginx's own status; it stands in our log, since nobody receives it."""
    return Answer(499, INVALID, "the client closed the connection", "client_closed_request")


def _step_failed(err: StepFailed) -> Answer:
    return Answer(500, SERVER, f"The model failed on this request: {err}", "generation_failed")


def _unexpected(_err: BaseException) -> Answer:
    return Answer(500, SERVER, "The server had an error while processing your request.", "internal_error")


TABLE: dict[type[BaseException], Callable[..., Answer]] = {
    ApiError: _api_error,
    HTTPException: _http,
    TemplateRefused: _template,
    RequestTooLong: _too_long,
    UnknownToken: _unknown_token,
    QueueFull: _queue_full,
    WaitedTooLong: _waited_too_long,
    NotServing: _not_serving,
    EngineDead: _dead,
    StepFailed: _step_failed,
    ClientGone: _gone,
    ClientDisconnect: _gone,  # while its body was read
    BaseException: _unexpected,
}


def answer(err: BaseException) -> Answer:
    """The row of the table for the exception's nearest type. What has no row of its own is logged."""
    build = next(TABLE[kind] for kind in type(err).__mro__ if kind in TABLE)
    if build in (_unexpected, _step_failed):
        log.error("a request failed: %s", type(err).__name__, exc_info=err)
    return build(err)
