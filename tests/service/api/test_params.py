import json

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

from service.api import params
from service.api.errors import ApiError, answer
from service.api.schemas import ChatCompletionRequest
from service.engine.types import RequestTooLong
from service.prompt.defaults import GenerationDefaults

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
LABELS = {
    "metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier",
}  # fmt: skip


def parse(**more):
    return params.parse(json.dumps({**ASK, **more}).encode())


def refusal(raw=None, **more):
    with pytest.raises(ApiError) as refused:
        params.parse(raw) if raw is not None else parse(**more)
    told = answer(refused.value)
    assert (told.status, told.type) == (400, "invalid_request_error")
    return told


def sampled(defaults=None, prompt_tokens=10, context=100, **more):
    return params.sampling(parse(**more), defaults or GenerationDefaults(), prompt_tokens, context)


def test_every_published_parameter_is_honoured_or_in_the_table_or_a_label():
    published = set(CompletionCreateParamsStreaming.__annotations__)
    honoured = set(ChatCompletionRequest.model_fields)
    assert len(published) > 35
    assert published - honoured - set(params.NO_OPS) == LABELS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 1), ("presence_penalty", 0), ("frequency_penalty", 0.0), ("logprobs", False),
        ("top_logprobs", 0), ("response_format", {"type": "text"}), ("tools", []), ("tool_choice", "auto"),
        ("tool_choice", "none"), ("logit_bias", {}), ("store", False), ("service_tier", "auto"),
        ("parallel_tool_calls", True),
        ("modalities", ["text"]), ("functions", []), ("function_call", "none"), ("verbosity", "medium"),
    ],
)  # fmt: skip
def test_a_parameter_at_its_no_op_value_is_accepted_and_not_called_ignored(name, value):
    assert params.ignored(parse(**{name: value})) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 2), ("n", True), ("n", "1"), ("n", [1]), ("presence_penalty", 0.5), ("frequency_penalty", -1),
        ("logprobs", True), ("logprobs", 0), ("top_logprobs", 5),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("tool_choice", {"type": "function"}), ("logit_bias", {"5": 100}),
        ("store", True), ("service_tier", "flex"), ("modalities", ["text", "audio"]), ("audio", {}),
        ("prediction", {"type": "content"}), ("reasoning_effort", "high"), ("web_search_options", {}),
        ("functions", [{}]), ("function_call", {"name": "f"}), ("moderation", {}), ("verbosity", "low"),
    ],
)  # fmt: skip
def test_a_known_parameter_that_would_change_the_answer_is_refused_by_its_name(name, value):
    told = refusal(**{name: value})
    assert (told.code, told.param) == ("unsupported_parameter", name)
    assert name in told.message


@pytest.mark.parametrize(
    "name", sorted(set(params.NO_OPS) | set(ChatCompletionRequest.model_fields) - set(ASK))
)
def test_null_is_unset(name):
    assert params.ignored(parse(**{name: None})) == {}


def test_unknown_parameters_are_named_once_and_in_a_form_that_fits_a_header():
    request = params.parse(
        json.dumps(
            {
                **ASK,
                "top_k": 5,
                "naïve\r\nset-cookie: a=b": 1,
                "metadata": {"a": "b"},
                "stream": True,
                "stream_options": {"include_usage": True, "every": 3},
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "cache": 1}], "name": "x"}
                ]
                * 3,
            }
        ).encode()
    )
    assert params.ignored(request) == {
        "x-snugfit-ignored": "top_k, na%C3%AFve%0D%0Aset-cookie%3A%20a%3Db, metadata, stream_options.every, "
        "messages.*.name, messages.*.content.*.cache"
    }


def test_the_header_of_ignored_names_stays_short():
    header = params.ignored(parse(**{f"unknown_{i}": i for i in range(1000)}))["x-snugfit-ignored"]
    assert len(header) < 1100
    assert header.endswith(" more")


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"messages": "hi"}, "invalid_type", "messages"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"content": "hi"}]}, "missing_required_parameter", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "invalid_type", "messages.0.content"),
        ({"messages": [{"role": "user", "content": []}]}, "invalid_value", "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
            "missing_required_parameter",
            "messages.0.content.0.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]},
            "invalid_type",
            "messages.0.content.0.text",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_json", None),
        ({"temperature": "0.5"}, "invalid_type", "temperature"),
        ({"temperature": True}, "invalid_type", "temperature"),
        ({"temperature": 2.1}, "invalid_value", "temperature"),
        ({"temperature": -0.1}, "invalid_value", "temperature"),
        ({"top_p": 1.5}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"max_tokens": 1.5}, "invalid_type", "max_tokens"),
        ({"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["a", ""]}, "invalid_value", "stop.1"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
        ({"stop": {"a": 1}}, "invalid_type", "stop"),
        ({"seed": 2**63}, "invalid_value", "seed"),
        ({"stream": "yes"}, "invalid_type", "stream"),
        ({"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
        (
            {"stream": True, "stream_options": {"include_usage": 1}},
            "invalid_type",
            "stream_options.include_usage",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "unsupported_parameter",
            "stream_options.include_obfuscation",
        ),
        ({"user": 5}, "invalid_type", "user"),
        ({"model": None}, "missing_required_parameter", "model"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(more, code, param):
    told = refusal(**more)
    assert (told.code, told.param) == (code, param)
    assert param is None or param in told.message


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"temperature": NaN}', b"hello"])
def test_a_body_that_is_not_json_is_refused(raw):
    assert refusal(raw).code == "invalid_json"


@pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b'"model"'])
def test_a_body_that_is_not_an_object_is_refused(raw):
    assert refusal(raw).code == "invalid_type"


def test_the_prompt_is_not_repeated_in_an_error():
    assert "secret" not in refusal(messages=[{"role": "user", "content": {"a": "secret"}}]).message


def test_the_requests_values_win_over_the_models():
    defaults = GenerationDefaults(0.7, 0.8, 20, 1.05, frozenset({3}))
    ours = sampled(defaults)
    assert (ours.temperature, ours.top_p, ours.top_k, ours.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert ours.stop_token_ids == {3}
    theirs = sampled(defaults, temperature=0, top_p=0.5, seed=-(2**63), stop="END")
    assert (theirs.temperature, theirs.top_p, theirs.seed, theirs.stop) == (0, 0.5, -(2**63), ("END",))


def test_a_nucleus_of_nothing_is_greedy():
    assert sampled(temperature=1e-50).temperature == 0, "no division by what is 0 in float32"
    assert sampled(temperature=1e-5).temperature == 1e-5
    assert (sampled(top_p=0).temperature, sampled(top_p=0).top_p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({}, 90),
        ({"max_tokens": 20}, 20),
        ({"max_tokens": 20, "max_completion_tokens": 30}, 30),
        ({"max_tokens": 1000}, 90),
    ],
)
def test_max_tokens_is_what_is_asked_within_what_is_left_of_the_context(more, tokens):
    assert sampled(**more).max_tokens == tokens


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers():
    assert sampled(prompt_tokens=99).max_tokens == 1
    with pytest.raises(RequestTooLong) as refused:
        sampled(prompt_tokens=100)
    told = answer(refused.value)
    assert (told.status, told.code, told.param) == (400, "context_length_exceeded", "messages")
    assert "maximum context length is 100 tokens" in told.message
    assert "100 tokens, which" in told.message
