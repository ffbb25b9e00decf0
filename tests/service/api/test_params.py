import json

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming

from service.api import params
from service.api.errors import ApiError, answer
from service.api.schemas import ChatCompletionRequest

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


def test_every_published_parameter_is_honoured_or_in_the_table_or_a_label():
    published = set(CompletionCreateParamsStreaming.__annotations__)
    honoured = set(ChatCompletionRequest.model_fields)
    assert len(published) > 35
    assert published - honoured - set(params.NO_OPS) == LABELS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("top_logprobs", 0), ("response_format", {"type": "text"}), ("tools", []), ("tool_choice", "auto"),
        ("tool_choice", "none"), ("store", False), ("service_tier", "auto"),
        ("parallel_tool_calls", True),
        ("modalities", ["text"]), ("functions", []), ("function_call", "none"), ("verbosity", "medium"),
    ],
)  # fmt: skip
def test_a_parameter_at_its_no_op_value_is_accepted_and_not_called_ignored(name, value):
    assert params.ignored(parse(**{name: value})) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("service_tier", True), ("service_tier", ["auto"]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}), ("tools", [{"type": "function"}]),
        ("tool_choice", "required"), ("tool_choice", {"type": "function"}),
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
                "top_a": 5,
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
        "x-snugfit-ignored": "top_a, na%C3%AFve%0D%0Aset-cookie%3A%20a%3Db, metadata, stream_options.every, "
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
        ({"n": 0}, "invalid_value", "n"),
        ({"n": 17}, "invalid_value", "n"),
        ({"n": True}, "invalid_type", "n"),
        ({"n": "1"}, "invalid_type", "n"),
        ({"presence_penalty": 2.1}, "invalid_value", "presence_penalty"),
        ({"frequency_penalty": -2.1}, "invalid_value", "frequency_penalty"),
        ({"logit_bias": [5]}, "invalid_type", "logit_bias"),
        ({"logit_bias": {"5": 100.5}}, "invalid_value", "logit_bias.5"),
        ({"logit_bias": {"5": "1"}}, "invalid_type", "logit_bias.5"),
        ({"logprobs": 1}, "invalid_type", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_value", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "invalid_value", "top_logprobs"),
        ({"top_logprobs": 5}, "invalid_value", "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 5}, "invalid_value", "top_logprobs"),
        ({"top_k": -2}, "invalid_value", "top_k"),
        ({"top_k": 2**63}, "invalid_value", "top_k"),
        ({"top_k": 0.5}, "invalid_type", "top_k"),
        ({"min_p": 1.1}, "invalid_value", "min_p"),
        ({"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
        ({"repetition_penalty": 1e-39}, "invalid_value", "repetition_penalty"),
        ({"repetition_penalty": 101}, "invalid_value", "repetition_penalty"),
        ({"min_tokens": -1}, "invalid_value", "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 6, "max_completion_tokens": 4}, "invalid_value", "min_tokens"),
        ({"ignore_eos": 1}, "invalid_type", "ignore_eos"),
        ({"stop_token_ids": 5}, "invalid_type", "stop_token_ids"),
        ({"stop_token_ids": [5, "6"]}, "invalid_type", "stop_token_ids.1"),
        ({"stop_token_ids": [-1]}, "invalid_value", "stop_token_ids.0"),
        ({"model": None}, "missing_required_parameter", "model"),
    ],
)
def test_what_is_wrong_is_refused_with_its_path(more, code, param):
    told = refusal(**more)
    assert (told.code, told.param) == (code, param)
    assert param is None or param in told.message


def test_a_limit_is_told_with_what_to_do():
    told = refusal(n=17).message
    assert told == "n: input should be less than or equal to 16; for more answers, send several requests"
    assert "0 or -1 turns it off" in refusal(top_k=-2).message
    assert "raise max_completion_tokens" in refusal(min_tokens=9, max_tokens=8).message


def test_lists_of_token_ids_have_a_limit_that_is_told():
    assert len(parse(logit_bias={str(id_): 1 for id_ in range(1024)}).logit_bias) == 1024
    assert len(parse(stop_token_ids=[5] * 1024).stop_token_ids) == 1024
    for more in ({"logit_bias": {str(id_): 1 for id_ in range(1025)}}, {"stop_token_ids": [5] * 1025}):
        told = refusal(**more)
        assert (told.code, told.param) == ("invalid_value", *more)
        assert "at most 1024" in told.message


@pytest.mark.parametrize(("limit"), [0.01, 100])
def test_the_limits_of_the_repetition_penalty_are_allowed(limit):
    assert parse(repetition_penalty=limit).repetition_penalty == limit


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"temperature": NaN}', b"hello"])
def test_a_body_that_is_not_json_is_refused(raw):
    assert refusal(raw).code == "invalid_json"


@pytest.mark.parametrize("raw", [b"[]", b"5", b"null", b'"model"'])
def test_a_body_that_is_not_an_object_is_refused(raw):
    assert refusal(raw).code == "invalid_type"


def test_the_prompt_is_not_repeated_in_an_error():
    assert "secret" not in refusal(messages=[{"role": "user", "content": {"a": "secret"}}]).message
