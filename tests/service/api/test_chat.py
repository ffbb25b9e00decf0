"""The wire of /v1/chat/completions, read by the official SDK and checked against the published schema."""

import asyncio
import json

import httpx
import openai
import pytest
from jsonschema import validate

from service.engine.types import QueueFull, RequestTooLong, StepFailed, WaitedTooLong

# The required fields of CreateChatCompletionResponse and CreateChatCompletionStreamResponse (openai-openapi).
USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {"prompt_tokens_details": {"type": "object", "required": ["cached_tokens"]}},
}
SHORT_USAGE = {
    "prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 0},
}  # fmt: skip
REASONS = ["stop", "length", "tool_calls", "content_filter", "function_call"]
COMPLETION = {
    "type": "object",
    "required": ["id", "choices", "created", "model", "object"],
    "properties": {
        "id": {"type": "string"},
        "created": {"type": "integer"},
        "object": {"const": "chat.completion"},
        "usage": USAGE,
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["finish_reason", "index", "message", "logprobs"],
                "properties": {
                    "finish_reason": {"enum": REASONS},
                    "logprobs": {"type": "null"},
                    "message": {
                        "type": "object",
                        "required": ["role", "content", "refusal"],
                        "properties": {"role": {"const": "assistant"}, "refusal": {"type": "null"}},
                    },
                },
            },
        },
    },
}
CHUNK = {
    "type": "object",
    "required": ["choices", "created", "id", "model", "object"],
    "properties": {
        "object": {"const": "chat.completion.chunk"},
        "usage": {"anyOf": [USAGE, {"type": "null"}]},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["delta", "finish_reason", "index", "logprobs"],
                "properties": {
                    "finish_reason": {"enum": [*REASONS, None]},
                    "delta": {"type": "object", "additionalProperties": {"type": "string"}},
                },
            },
        },
    },
}


def events(response):
    """The data of every frame, [DONE] last and left out."""
    frames = [line[6:] for line in response.text.split("\n") if line.startswith("data: ")]
    assert frames.pop() == "[DONE]"
    return [json.loads(frame) for frame in frames]


def test_an_answer_has_every_field_that_the_specification_requires(live):
    response = live.post()
    body = response.json()
    validate(body, COMPLETION)
    assert response.headers["content-type"] == "application/json"
    assert body["model"] == "lab/tiny"
    assert body["id"].startswith("chatcmpl-")
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    assert body["usage"] == SHORT_USAGE
    assert "x-snugfit-ignored" not in response.headers


def test_every_chunk_has_the_required_fields_and_one_id_and_time(live):
    response = live.post(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response)
    for chunk in chunks:
        validate(chunk, CHUNK)
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)


def test_usage_comes_in_a_last_chunk_without_choices_and_only_when_asked_for(live):
    *chunks, last = events(live.post(stream=True, stream_options={"include_usage": True}))
    validate(last, CHUNK)
    assert last["choices"] == []
    assert last["usage"] == SHORT_USAGE
    assert all(chunk["usage"] is None for chunk in chunks)


def test_the_sdk_reads_answers_and_streams(live):
    client = live.client()
    whole = client.chat.completions.create(**live.ask(temperature=0, seed=7, user="u-1"))
    assert whole.choices[0].message.content == "Hello"
    assert whole._request_id.startswith("req_")
    stream = client.chat.completions.create(**live.ask(stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "Hello"
    with client.chat.completions.stream(**live.ask()) as helper:
        assert helper.get_final_completion().choices[0].message.content == "Hello"


def test_the_async_sdk_reads_answers_and_streams(live):
    async def both():
        async with live.client(openai.AsyncOpenAI) as client:
            whole = await client.chat.completions.create(**live.ask())
            stream = await client.chat.completions.create(**live.ask(stream=True))
            return whole.choices[0].message.content, [chunk async for chunk in stream]

    text, chunks = asyncio.run(both())
    assert text == "Hello"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_what_the_request_says_reaches_the_engine(live):
    live.post(temperature=0.25, top_p=0.5, max_completion_tokens=9, stop=["\n", "END"], seed=-5)
    request = live.engine.requests[-1]
    assert request.prompt_ids == (0, 1)
    assert (request.params.temperature, request.params.top_p) == (0.25, 0.5)
    assert (request.params.max_tokens, request.params.seed) == (9, -5)
    assert request.params.stop == ("\n", "END")


def test_text_that_json_and_sse_must_escape_arrives_as_it_was(running, scripted):
    pieces = ("a\nb\r\n\n", '"data: [DONE]"', "\u2028\u0085", "你好🙂", "")
    with running(scripted(pieces)) as live:
        stream = live.client().chat.completions.create(**live.ask(stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "".join(pieces)
        assert live.post().json()["choices"][0]["message"]["content"] == "".join(pieces)


def test_what_had_no_effect_is_named_in_a_header_streaming_or_not(live):
    for stream in (False, True):
        response = live.post(stream=stream, top_a=5, mirostat=2)
        assert response.status_code == 200
        assert response.headers["x-snugfit-ignored"] == "top_a, mirostat"


def test_an_unsupported_parameter_is_refused_in_the_sdks_own_terms(live):
    with pytest.raises(openai.BadRequestError) as refused:
        live.client().chat.completions.create(**live.ask(verbosity="low"))
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "verbosity")
    assert refused.value.type == "invalid_request_error"
    assert not live.engine.requests


def test_an_unknown_model_is_404_and_a_missing_one_400(live):
    with pytest.raises(openai.NotFoundError) as refused:
        live.client().chat.completions.create(**live.ask(model="gpt-4o"))
    assert refused.value.code == "model_not_found"
    assert live.post(model=None).json()["error"]["param"] == "model"


def test_what_a_web_page_can_send_unasked_is_refused(live):
    """A browser asks before it sends JSON to another origin; forms and plain text it just sends."""
    for content_type in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
    ):
        response = live.post({"content-type": content_type})
        assert response.status_code == 415
        assert response.json()["error"]["code"] == "unsupported_media_type"
    assert live.engine.requests == []
    assert live.post({"content-type": "application/json; charset=utf-8"}).status_code == 200


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([{}] * 200_000, "messages.0.role"),
        ([{"role": "user", "content": [1] * 200_000}], "messages.0.content.0"),
    ],
    ids=["messages", "parts"],
)
def test_of_many_wrong_entries_the_first_is_told(live, messages, param):
    response = live.post(messages=messages)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_text_that_no_tokens_could_make_fit_is_refused_without_reading_it(live):
    response = live.post(messages=[{"role": "user", "content": "x" * 64_000}])
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert live.template.seen == []


def test_a_prompt_that_is_too_long_is_refused_before_the_queue_with_both_numbers(live):
    response = live.post(messages=[{"role": "user", "content": "word " * 70}])
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert "64 tokens" in error["message"]
    assert "70 tokens" in error["message"]
    assert not live.engine.requests


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "seconds"),
    [
        (QueueFull(64, 64, 2.5), 429, "queue_full", ("3", "2500")),
        (WaitedTooLong(600, 2.5), 503, "waited_too_long", ("3", "2500")),
        (RequestTooLong(70, 64), 400, "context_length_exceeded", None),
        (StepFailed("out of memory"), 500, "generation_failed", None),
        (KeyError("prompt text"), 500, "internal_error", None),
    ],
)
def test_an_error_before_the_first_token_is_a_status(running, scripted, stream, error, status, code, seconds):
    with running(scripted(raise_at=0, error=error)) as live:
        response = live.post(stream=stream)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.json()["error"]["code"] == code
        assert "prompt text" not in response.text
        given = response.headers.get("retry-after"), response.headers.get("retry-after-ms")
        assert given == (seconds or (None, None))
        assert response.headers["x-request-id"]


def test_an_error_after_the_first_token_is_a_last_frame(running, scripted):
    with running(scripted(raise_at=1, error=StepFailed("out of memory"))) as live:
        text = live.post(stream=True).text
        assert json.loads(text.split("data: ")[-1])["error"]["code"] == "generation_failed"
        assert "[DONE]" not in text
        with pytest.raises(openai.APIError, match="out of memory"):
            list(live.client().chat.completions.create(**live.ask(stream=True)))
        assert live.post().status_code == 500


def test_an_engine_that_stops_without_a_reason_is_an_error_and_not_an_answer(running, scripted):
    with running(scripted(finish=None)) as live:
        assert live.post().json()["error"]["code"] == "generation_failed"
        assert '"error"' in live.post(stream=True).text


def test_a_full_queue_is_retried_by_the_sdk(running, scripted):
    engine = scripted(raise_at=0, error=QueueFull(1, 1, 0.05))
    with running(engine) as live:
        with pytest.raises(openai.RateLimitError):
            live.client(max_retries=2).chat.completions.create(**live.ask())
        assert len(engine.requests) == 3


def test_silence_before_the_first_token_is_filled_with_comments(running, scripted, until):
    with (
        running(scripted(hold_at=0), keep_alive_seconds=0.05) as live,
        httpx.stream("POST", f"{live.url}/v1/chat/completions", json=live.ask(stream=True)) as response,
    ):
        assert response.status_code == 200
        lines = response.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", "", ": keep-alive", ""]
        live.engine.release()
        assert any(line == "data: [DONE]" for line in lines)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("hold_at", [0, 1])
def test_a_client_that_leaves_stops_its_generation(running, scripted, until, stream, hold_at):
    with running(scripted(hold_at=hold_at)) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/chat/completions", json=live.ask(stream=stream), timeout=0.3)
        until(lambda: live.engine.aborted, "the abort")
        until(lambda: not live.service.active, "the end of the request")
        assert live.engine.running == 0
        assert live.service.responses[499 if not stream or hold_at == 0 else 200] == 1


def test_two_clients_are_answered_at_the_same_time(running, scripted, until):
    with running(scripted(hold_at=1)) as live, httpx.Client() as client:
        asks = [
            client.build_request("POST", f"{live.url}/v1/chat/completions", json=live.ask(stream=True))
        ] * 2
        first, second = (client.send(ask, stream=True) for ask in asks)
        until(lambda: live.engine.running == 2, "two at once")
        live.engine.release()
        assert first.read().endswith(second.read()[-16:])
