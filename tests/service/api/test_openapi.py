"""/openapi.json: a valid description, as strict as OpenAI's own, and true of what is served.

What is served is also checked against OpenAI's required lists directly in test_chat.py.
"""

import json

import httpx
import pytest
from jsonschema import Draft202012Validator
from referencing import Registry
from referencing.jsonschema import DRAFT202012

from service.api import errors
from service.api.docs import ERRORS
from service.app import create_app
from service.engine.types import EngineDead, QueueFull
from service.settings import Settings

CHAT = "/v1/chat/completions"
BODY = "/paths/~1v1~1chat~1completions/post/requestBody/content/application~1json/schema"
DOCUMENT = "urn:openapi"
# What the published specification requires (openai-openapi), by the names of the schemas here.
REQUIRED = {
    "ChatCompletion": {"id", "choices", "created", "model", "object"},
    "Choice": {"finish_reason", "index", "message", "logprobs"},
    "AssistantMessage": {"role", "content", "refusal"},
    "Usage": {"prompt_tokens", "completion_tokens", "total_tokens"},
    "Logprobs": {"content", "refusal"},
    "TokenLogprob": {"token", "logprob", "bytes", "top_logprobs"},
    "TopLogprob": {"token", "logprob", "bytes"},
    "ErrorBody": {"error"},
    "ErrorDetail": {"type", "message", "param", "code"},
    "Model": {"id", "object", "created", "owned_by"},
    "ModelList": {"object", "data"},
}
FINISH = ["stop", "length", "tool_calls", "content_filter", "function_call"]
TEXT, NUMBER = {"type": "string"}, {"type": "integer"}
# CreateChatCompletionStreamResponse; /openapi.json describes JSON only, so this stands here.
CHUNK = {
    "type": "object",
    "required": ["choices", "created", "id", "model", "object"],
    "properties": {
        "id": TEXT, "created": NUMBER, "model": TEXT, "object": {"const": "chat.completion.chunk"},
        "choices": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["delta", "finish_reason", "index"],
                "properties": {
                    "index": NUMBER, "finish_reason": {"enum": [*FINISH, None]},
                    "delta": {
                        "type": "object", "properties": {"role": {"const": "assistant"}, "content": TEXT},
                    },
                },
            },
        },
        "usage": {
            "type": ["object", "null"], "required": sorted(REQUIRED["Usage"]),
            "properties": {
                "prompt_tokens_details": {"type": "object", "properties": {"cached_tokens": NUMBER}},
            },
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def document():
    """What is served, which the first test below makes sure of; once, because it takes a while to make."""
    return create_app(Settings(), start=lambda _progress: None).openapi()


def validator(document, pointer):
    """For the schema at this place of the document, references into the whole of it included."""
    whole = Registry().with_resource(DOCUMENT, DRAFT202012.create_resource(document))
    return Draft202012Validator({"$ref": f"{DOCUMENT}#{pointer}"}, registry=whole)


def declared(path, method, status):
    """Where the document says what such a response looks like."""
    escaped = path.replace("~", "~0").replace("/", "~1")
    return f"/paths/{escaped}/{method}/responses/{status}/content/application~1json/schema"


def references(node):
    """Every $ref in the document."""
    if isinstance(node, dict):
        yield from ([node["$ref"]] if isinstance(node.get("$ref"), str) else [])
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def schemas(document):
    """Every schema of the document with the place it has."""
    yield from document["components"]["schemas"].items()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            bodies = {"request": operation.get("requestBody", {}), **operation["responses"]}
            for which, body in bodies.items():
                for media, content in body.get("content", {}).items():
                    yield f"{method} {path} {which} {media}", content["schema"]
            for parameter in operation.get("parameters", ()):
                yield f"{method} {path} {parameter['name']}", parameter["schema"]


def test_it_is_served_as_openapi_3_1_with_the_version_that_runs(live, document):
    response = live.get("/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.json() == document
    assert document["openapi"].startswith("3.1")
    assert document["info"] == {"title": "snugfit", "version": live.app.version}


def test_it_is_there_while_the_model_is_loading_and_needs_a_key_when_there_are_keys(running):
    def never(progress):
        while True:
            progress(0, 0)

    with running(start=never, wait=False, api_key=["k1"]) as live:
        assert live.get("/openapi.json").status_code == 401
        assert live.get("/openapi.json", headers={"authorization": "Bearer k1"}).status_code == 200


def test_no_page_is_served_that_fetches_scripts_from_elsewhere(live):
    assert [live.get(path).status_code for path in ("/docs", "/redoc")] == [404, 404]


def test_every_schema_in_it_is_a_schema(document):
    found = dict(schemas(document))
    assert len(found) > 10
    for schema in found.values():
        Draft202012Validator.check_schema(schema)


def test_every_reference_in_it_leads_somewhere_in_it(document):
    found = set(references(document))
    assert found
    resolver = Registry().with_resource(DOCUMENT, DRAFT202012.create_resource(document)).resolver(DOCUMENT)
    for reference in found:
        assert reference.startswith("#/")
        assert resolver.lookup(reference).contents


def test_every_operation_has_an_id_of_its_own_and_a_response(document):
    operations = [op for methods in document["paths"].values() for op in methods.values()]
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert all("200" in operation["responses"] for operation in operations)


@pytest.mark.parametrize("name", REQUIRED)
def test_it_requires_what_openai_requires(document, name):
    assert set(document["components"]["schemas"][name]["required"]) >= REQUIRED[name]


def test_requests_that_are_answered_are_valid_by_it(document, live):
    body = validator(document, BODY)
    asks = [
        live.ask(),
        live.ask(temperature=0.5, top_p=0.1, max_tokens=3, seed=1, stop="END", user="u"),
        live.ask(stop=["a", "b"], max_completion_tokens=3, temperature=None, unknown_to_all={"a": 1}),
        live.ask(messages=[{"role": "user", "content": [{"type": "text", "text": "hi"}]}]),
        live.ask(stream=True, stream_options={"include_usage": True}),
        live.ask(n=2, presence_penalty=-2, frequency_penalty=2, logit_bias={"5": -100, "99": 0.5}),
        live.ask(logprobs=True, top_logprobs=20),
        live.ask(top_k=-1, min_p=0.05, repetition_penalty=1.1, min_tokens=2, ignore_eos=True),
        live.ask(stop_token_ids=[0, 99]),
    ]
    for ask in asks:
        body.validate(ask)
        assert httpx.post(live.url + CHAT, json=ask).status_code == 200


def test_requests_that_are_not_valid_by_it_are_refused(document, live):
    body = validator(document, BODY)
    for more in (
        {"messages": []}, {"messages": "hi"}, {"messages": [{"content": "hi"}]}, {"temperature": 3},
        {"max_tokens": 0}, {"stop": ["a"] * 5}, {"stop": [""]}, {"stop": ""}, {"seed": "x"},
        {"stream": "yes"}, {"n": 17}, {"n": 0}, {"presence_penalty": 3}, {"frequency_penalty": -2.1},
        {"logit_bias": {"5": 101}}, {"logit_bias": [5]}, {"logprobs": 1}, {"top_logprobs": 21},
        {"top_k": -2}, {"min_p": 1.1}, {"repetition_penalty": 0}, {"min_tokens": -1}, {"ignore_eos": 1},
        {"stop_token_ids": [-1]}, {"stop_token_ids": 5},
    ):  # fmt: skip
        assert not body.is_valid(live.ask(**more)), more
        assert live.post(**more).status_code == 400, more


def test_a_completion_is_what_it_declares(document, live):
    answer = validator(document, declared(CHAT, "post", 200))
    answer.validate(live.post().json())
    choice = live.post().json()["choices"][0]
    assert choice["finish_reason"] in FINISH
    for missing in choice:
        broken = live.post().json() | {"choices": [{k: v for k, v in choice.items() if k != missing}]}
        assert not answer.is_valid(broken), missing


def test_every_chunk_of_a_stream_is_what_openai_specifies(live):
    Draft202012Validator.check_schema(CHUNK)
    for options in ({}, {"stream_options": {"include_usage": True}}):
        text = live.post(stream=True, **options).text
        *frames, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert done == "[DONE]"
        assert len(frames) == 4 + bool(options)
        for frame in frames:
            Draft202012Validator(CHUNK).validate(json.loads(frame))


def test_what_can_be_got_is_what_it_declares(document, live):
    for path in ("/v1/models", "/v1/models/{id}", "/health", "/ready"):
        answer = live.get(path.format(id="lab/tiny"))
        validator(document, declared(path, "get", 200)).validate(answer.json())


def test_what_is_not_ready_is_what_it_declares(document, live):
    live.engine.alive = False
    for path in ("/health", "/ready"):
        response = live.get(path)
        assert response.status_code == 503
        validator(document, declared(path, "get", 503)).validate(response.json())


def test_every_refusal_is_declared_and_is_what_it_declares(document, running, scripted):
    with running(scripted(raise_at=0), api_key=["k"], max_body_bytes=1024) as live:
        key = {"authorization": "Bearer k"}
        long = [{"role": "user", "content": "x" * 2000}]
        refusals = [
            live.post(), live.post(key, n=50), live.post(key, model="other"), live.post(key, messages=long),
            live.post({**key, "content-type": "text/plain"}),
        ]  # fmt: skip
        for error in (QueueFull(1, 1, 1), EngineDead("ended")):
            live.engine.error = error
            refusals.append(live.post(key))
        assert {response.status_code for response in refusals} == set(ERRORS)
        for response in refusals:
            schema = validator(document, declared(CHAT, "post", response.status_code))
            schema.validate(response.json())
            for missing in REQUIRED["ErrorDetail"]:
                detail = {k: v for k, v in response.json()["error"].items() if k != missing}
                assert not schema.is_valid({"error": detail}), missing


def test_an_error_inside_a_stream_has_the_same_shape(document, running, scripted):
    with running(scripted(raise_at=1, error=errors.UnknownModel("a", "b"))) as live:
        last = live.post(stream=True).text.rstrip("\n").rpartition("data: ")[2]
        validator(document, "/components/schemas/ErrorBody").validate(json.loads(last))
