"""The table in service/api/errors.py, row by row, as it goes over the wire."""

import json

import openai
import pytest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from service.api import errors
from service.api.errors import (
    ApiError,
    BodyTooLarge,
    ClientGone,
    InvalidApiKey,
    NotJson,
    UnknownModel,
    Unsupported,
)
from service.engine.types import (
    DeviceLost,
    EngineDead,
    EngineError,
    QueueFull,
    RequestTooLong,
    StepFailed,
    UnknownToken,
    WaitedTooLong,
)
from service.lifecycle import Draining, LoadFailed, Loading, NotServing
from service.prompt.template import TemplateRefused

REQUEST, SERVER, LIMIT = "invalid_request_error", "server_error", "rate_limit_error"
PROGRESS = {"phase": "reading weights", "done_bytes": 500, "total_bytes": 1000}
SECRET = "sk-my-secret"
# error, status, type, code, param, (retry-after, retry-after-ms)
ROWS = [
    (ApiError("no", code="invalid_value", param="top_p"), 400, REQUEST, "invalid_value", "top_p", None),
    (ApiError("no", code="c", status=418), 418, REQUEST, "c", None, None),
    (UnknownModel("a", "b"), 404, REQUEST, "model_not_found", "model", None),
    (Unsupported("n", "send 1"), 400, REQUEST, "unsupported_parameter", "n", None),
    (BodyTooLarge(1000), 413, REQUEST, "request_too_large", None, None),
    (NotJson("text/plain"), 415, REQUEST, "unsupported_media_type", None, None),
    (InvalidApiKey(), 401, REQUEST, "invalid_api_key", None, None),
    (HTTPException(404), 404, REQUEST, "not_found", None, None),
    (HTTPException(405), 405, REQUEST, "method_not_allowed", None, None),
    (HTTPException(501), 501, SERVER, "not_implemented", None, None),
    (TemplateRefused("roles must alternate"), 400, REQUEST, "invalid_messages", "messages", None),
    (RequestTooLong(70, 64), 400, REQUEST, "context_length_exceeded", "messages", None),
    (UnknownToken(70, 64), 400, REQUEST, "unknown_token", "messages", None),
    (QueueFull(64, 64, 2.5), 429, LIMIT, "queue_full", None, ("3", "2500")),
    (WaitedTooLong(600, 2.5), 503, SERVER, "waited_too_long", None, ("3", "2500")),
    (NotServing("not now"), 503, SERVER, "not_serving", None, ("5", "5000")),
    (Loading(PROGRESS), 503, SERVER, "model_loading", None, ("5", "5000")),
    (Draining(), 503, SERVER, "draining", None, ("10", "10000")),
    (LoadFailed(OSError("gone")), 503, SERVER, "load_failed", None, ("30", "30000")),
    (EngineDead("ended"), 503, SERVER, "engine_dead", None, ("30", "30000")),
    (StepFailed("out of memory"), 500, SERVER, "generation_failed", None, None),
    (ClientGone(), 499, REQUEST, "client_closed_request", None, None),
    (ClientDisconnect(), 499, REQUEST, "client_closed_request", None, None),
    (EngineError(SECRET), 500, SERVER, "internal_error", None, None),
    (DeviceLost(SECRET), 500, SERVER, "internal_error", None, None),
    (KeyError(SECRET), 500, SERVER, "internal_error", None, None),
    (BaseException(SECRET), 500, SERVER, "internal_error", None, None),
]
SDK = {
    400: openai.BadRequestError, 401: openai.AuthenticationError, 404: openai.NotFoundError,
    429: openai.RateLimitError, 500: openai.InternalServerError, 501: openai.InternalServerError,
    503: openai.InternalServerError,
}  # fmt: skip


def name(row):
    return f"{type(row[0]).__name__} {row[1]}"


def ours(base):
    """The classes below `base` that the service itself defines."""
    for kind in base.__subclasses__():
        if kind.__module__.startswith("service."):
            yield kind
        yield from ours(kind)


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_every_error_has_its_status_and_openais_body_with_all_four_keys(row):
    error, status, kind, code, param, _ = row
    response = errors.answer(error).response()
    body = json.loads(response.body)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["code"], body["error"]["param"]) == (kind, code, param)
    assert body["error"]["message"]


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_when_to_come_back_is_told_where_it_helps_and_nowhere_else(row):
    error, *_, wait = row
    headers = errors.answer(error).response().headers
    assert (headers.get("retry-after"), headers.get("retry-after-ms")) == (wait or (None, None))


@pytest.mark.parametrize("base", [ApiError, EngineError, NotServing])
def test_no_type_of_error_is_missing_in_these_rows(base):
    assert set(ours(base)) <= {type(error) for error, *_ in ROWS}


def test_every_row_of_the_table_is_met_by_an_error():
    met = {next(kind for kind in type(error).__mro__ if kind in errors.TABLE) for error, *_ in ROWS}
    assert met == set(errors.TABLE)


def test_a_type_without_a_row_is_answered_as_the_nearest_that_has_one():
    class Fuller(QueueFull):
        pass

    assert errors.answer(Fuller(1, 1, 1)).code == "queue_full"


def test_only_a_wrong_key_asks_for_one():
    asking = {type(e) for e, *_ in ROWS if "www-authenticate" in errors.answer(e).response().headers}
    assert asking == {InvalidApiKey}


def test_what_a_router_adds_to_its_refusal_is_kept():
    refused = HTTPException(405, headers={"allow": "POST"})
    assert errors.answer(refused).response().headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("seconds", "whole", "milliseconds"),
    [(0, "1", "0"), (0.05, "1", "50"), (1, "1", "1000"), (1.0001, "2", "1001"), (59.5, "60", "59500")],
)
def test_a_wait_is_rounded_up_and_never_0_whole_seconds(seconds, whole, milliseconds):
    assert errors.retry_after(seconds) == {"retry-after": whole, "retry-after-ms": milliseconds}


@pytest.mark.parametrize("error", [error for error, *_ in ROWS if SECRET in str(error)], ids=repr)
def test_an_unexpected_error_says_nothing_of_its_text_to_the_client_and_all_to_the_log(error, service_log):
    answer = errors.answer(error)
    assert SECRET not in answer.body().decode()
    assert SECRET not in str(answer.headers)
    (record,) = service_log.records
    assert record.exc_info[1] is error
    assert type(error).__name__ in record.getMessage()


def test_a_failed_step_is_logged_and_a_refusal_is_not(service_log):
    errors.answer(StepFailed("out of memory"))
    assert len(service_log.records) == 1
    for error in (
        InvalidApiKey(),
        QueueFull(1, 1, 1),
        Draining(),
        RequestTooLong(70, 64),
        HTTPException(404),
    ):
        errors.answer(error)
    assert len(service_log.records) == 1


def test_a_token_that_the_model_does_not_have_is_named_with_those_it_has():
    message = errors.answer(UnknownToken(70, 64)).message
    assert "token 70" in message
    assert "0 to 63" in message
    assert "tokenizer" in message


def test_a_message_of_any_text_is_json():
    body = errors.answer(ApiError('"\n\x00 你好 \u2028', code="c")).body()
    assert json.loads(body)["error"]["message"] == '"\n\x00 你好 \u2028'


def test_the_sdk_raises_its_own_type_for_each_with_code_and_param(running, scripted):
    """By way of a real server: the engine raises what is in the row."""
    with running(scripted(raise_at=0)) as live, live.client() as client:
        for error, status, _, code, param, _ in ROWS:
            if not isinstance(error, Exception):
                continue  # no exception to a server, but its end
            live.engine.error = error
            with pytest.raises(openai.APIStatusError) as caught:
                client.chat.completions.create(**live.ask())
            assert type(caught.value) is SDK.get(status, openai.APIStatusError), name((error, status))
            assert (caught.value.status_code, caught.value.code, caught.value.param) == (status, code, param)
