"""Wire types of the OpenAI API: what is read and written, and nothing that decides.

Requests are strict (no "0.5" for 0.5), and null means unset. Chunks are dumped with `exclude_unset`: a field
that the specification wants present as null is set to None, one that must be
absent is left unset.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

INT64 = 2**63
MAX_STOPS = 4
# Far more than any context holds; and one wrong entry is told, not a million of them.
MAX_MESSAGES, MAX_PARTS = 4096, 1024


class _Request(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True, hide_input_in_errors=True)


class ContentPart(_Request):
    """One part of a message. Only `text` is understood; the other types are refused by name."""

    type: str
    text: str | None = None


Parts = Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]


class ChatMessage(_Request):
    role: str
    content: str | Parts | None = None


class StreamOptions(_Request):
    include_usage: bool | None = None


def _as_list(value: object) -> object:
    """`stop` may be one string."""
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1)]
StopList = Annotated[list[StopString], Field(max_length=MAX_STOPS)]
StopInput = BeforeValidator(_as_list, json_schema_input_type=StopString | StopList | None)


class ChatCompletionRequest(_Request):
    """What is honoured. Everything else lands in `model_extra`, for `service.api.params` to judge."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: Annotated[StopList | None, StopInput] = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class _Response(BaseModel):
    """Sent whole, so /openapi.json says that every field is required, also one with a default."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AssistantMessage(_Response):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Response):
    index: int = 0
    message: AssistantMessage
    logprobs: None = None
    finish_reason: str


class ChatCompletion(_Response):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """Fields are left unset in chunks that do not carry them."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: None
    finish_reason: str | None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None  # unset unless the client asked for usage


class Model(_Response):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "snugfit"
    max_model_len: int  # the name by which vLLM's clients look for the context length


class ModelList(_Response):
    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: str


class Readiness(BaseModel):
    """`/ready`: the status in a word, and how far loading is or why it failed."""

    status: str
    model: str
    progress: dict[str, Any] | None = None
    error: str | None = None
