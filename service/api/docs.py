"""What /openapi.json says about the endpoints that read their body themselves."""

from __future__ import annotations

from typing import Any

from service.api.schemas import ChatCompletion, ChatCompletionRequest, ErrorBody

_REFUSALS = {
    400: "The request is malformed, too long, or asks for what is not supported.",
    401: "Missing or wrong API key.",
    404: "No such model.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    429: "The queue is full; see Retry-After.",
    503: "Loading, draining, not started in time, or the engine is dead; see Retry-After.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": words} for status, words in _REFUSALS.items()
}
# References start at the top of the document, so the body's definitions are named by where they stand in it.
_BODY_POINTER = "#/paths/~1v1~1chat~1completions/post/requestBody/content/application~1json/schema"
_BODY = {
    "application/json": {
        "schema": ChatCompletionRequest.model_json_schema(ref_template=_BODY_POINTER + "/$defs/{model}")
    }
}
CHAT_DOCS: dict[str, Any] = {
    "summary": "Create a chat completion, as one JSON object or, with stream, as server-sent events",
    "responses": {200: {"model": ChatCompletion}, **ERRORS},
    "openapi_extra": {"requestBody": {"required": True, "content": _BODY}},
}
