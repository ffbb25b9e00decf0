"""Chat messages from the wire to what a template takes: a role and a text each."""

from __future__ import annotations

from collections.abc import Sequence

from service.api.errors import ApiError, Unsupported
from service.api.schemas import ChatMessage, ContentPart

ROLES = frozenset({"system", "developer", "user", "assistant"})
# Keys of an assistant's turn that mean something we cannot render yet.
ASSISTANT_ONLY = ("tool_calls", "function_call", "audio", "refusal")


def plain(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """`role` and `content` of each message, text parts joined without anything between them.

    Raises ApiError (400) that names the message and what in it is not understood.
    """
    return [
        {"role": _role(message, f"messages.{i}"), "content": _text(message, f"messages.{i}.content")}
        for i, message in enumerate(messages)
    ]


def _role(message: ChatMessage, path: str) -> str:
    if message.role not in ROLES:
        raise ApiError(
            f"{path}.role: {message.role!r} is not supported; roles are {', '.join(sorted(ROLES))}.",
            code="unsupported_value",
            param=f"{path}.role",
        )
    for key in ASSISTANT_ONLY:
        if (message.model_extra or {}).get(key):
            raise Unsupported(f"{path}.{key}", "send the turn's text as content")
    return message.role


def _text(message: ChatMessage, path: str) -> str:
    if message.content is None:
        raise ApiError(f"{path}: is required", code="missing_required_parameter", param=path)
    if isinstance(message.content, str):
        return message.content
    return "".join(_part(part, f"{path}.{i}") for i, part in enumerate(message.content))


def _part(part: ContentPart, path: str) -> str:
    if part.type != "text":
        raise ApiError(
            f"{path}.type: parts of type {part.type!r} are not supported; this model reads text.",
            code="unsupported_value",
            param=f"{path}.type",
        )
    if part.text is None:
        raise ApiError(f"{path}.text: is required", code="missing_required_parameter", param=f"{path}.text")
    return part.text
