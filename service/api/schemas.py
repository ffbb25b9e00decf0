"""Wire types of the OpenAI API: what is read and written, and nothing that decides.

Requests are strict (no "0.5" for 0.5), and null means unset. The chunks of a stream are not here: they are
written by `service.api.chunks`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from typing_extensions import TypedDict

INT64 = 2**63
MAX_STOPS = 4
# Answers to one request. In the engine they are as many requests, and other clients wait there too.
MAX_CHOICES = 16
MAX_TOP_LOGPROBS = 20
# Token ids in logit_bias, and in stop_token_ids: each step works on them, and the other rows wait. OpenAI
# states no limit; vLLM (v1/worker/gpu/sample/logit_bias.py) takes 1,024 biases and 128 ids that stop.
MAX_TOKEN_IDS = 1024
# vLLM and transformers ask for more than 0 alone. What is still smaller or greater than these makes no other
# text, and where float32 ends it makes scores infinite.
LEAST_REPETITION, MOST_REPETITION = 0.01, 100
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
TokenId = Annotated[int, Field(ge=0)]  # below the size of the vocabulary, which service.api.sampling knows
Bias = Annotated[float, Field(ge=-100, le=100)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
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
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=MAX_TOKEN_IDS)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # vLLM's, by vLLM's names and with its meanings
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None  # 0 and -1: off
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=LEAST_REPETITION, le=MOST_REPETITION)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_TOKEN_IDS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class _Response(BaseModel):
    """Sent whole, so /openapi.json says that every field is required, also one with a default."""

    model_config = ConfigDict(json_schema_serialization_defaults_required=True)


class PromptTokensDetails(BaseModel):
    cached_tokens: int  # of the prompt, that were not computed again


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(TypedDict):
    """One token; `bytes` are its own, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class Logprobs(TypedDict):
    """One entry for every token of `usage.completion_tokens`, the one that ended the answer included."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(_Response):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(_Response):
    index: int = 0
    message: AssistantMessage
    logprobs: Logprobs | None = None
    finish_reason: str


class ChatCompletion(_Response):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


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
