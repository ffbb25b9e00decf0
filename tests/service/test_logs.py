"""service/logs.py: what a line looks like, whose lines there are, and what is in none of them."""

import asyncio
import gc
import json
import logging
import re
import warnings
from collections import Counter
from functools import partial

import httpx
import pytest

from service import logs
from service.engine.types import StepFailed
from service.prompt.template import TemplateRefused

CANARY = "xyzzy-canary"
RFC3339 = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def within_a_request():
    token = logs.request_id.set("req_1")
    yield
    logs.request_id.reset(token)


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def say(logger, level=logging.INFO, text="it is said"):
    logging.getLogger(logger).log(level, text)


@pytest.mark.parametrize("logger", ["loader", "service", "loader.plan", "service.engine.engine"])
def test_our_log_goes_to_stderr_and_stdout_stays_clean(capsys, logger):
    logs.to_stderr("info")
    say(logger)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} INFO    {logger}: it is said\n", err)


@pytest.mark.parametrize("name", ["debug", "info", "warning", "error"])
def test_every_level_that_the_settings_accept_shows_itself_and_what_is_graver(capsys, name):
    logs.to_stderr(name)
    levels = [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL]
    for level in levels:
        say("service.app", level, logging.getLevelName(level).lower())
    shown = [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    every = [logging.getLevelName(level).lower() for level in levels]
    assert shown == every[every.index(name) :]


def test_a_line_is_there_once_however_often_it_was_set_up_and_whatever_the_root_does(capsys):
    root = logging.getLogger()
    others = logging.StreamHandler()
    root.addHandler(others)
    try:
        logs.to_stderr("info")
        logs.to_stderr("info")
        say("service.app")
    finally:
        root.removeHandler(others)
    assert capsys.readouterr().err.count("it is said") == 1


def test_the_last_level_holds(capsys):
    logs.to_stderr("debug")
    logs.to_stderr("error")
    say("service.app", logging.WARNING)
    assert capsys.readouterr().err == ""


def test_the_loggers_of_other_libraries_are_left_alone():
    others = [logging.getLogger(name) for name in ("uvicorn", "httpx", "transformers", "services")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in others]
    logs.to_stderr("debug")
    assert [(list(logger.handlers), logger.level, logger.propagate) for logger in others] == before


def test_a_json_line_is_one_object_with_the_time_in_utc(capsys):
    logs.to_stderr("info", "json")
    logging.getLogger("service.app").warning("two\nlines of %s", "text", extra={"fields": {"status": 200}})
    (line,) = objects(capsys.readouterr().err)
    assert RFC3339.fullmatch(line.pop("time"))
    assert line == {
        "level": "warning", "logger": "service.app", "message": "two\nlines of text", "status": 200,
    }  # fmt: skip


def test_a_json_line_names_the_request_it_belongs_to(capsys, within_a_request):
    logs.to_stderr("info", "json")
    token = logs.trace_id.set("0af7")
    say("service.app")
    logs.trace_id.reset(token)
    (line,) = objects(capsys.readouterr().err)
    assert (line["request_id"], line["trace_id"]) == ("req_1", "0af7")


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    "name", ["uvicorn.error", "asyncio", "transformers.models", "huggingface_hub.file", "torch.jit"]
)
def test_other_libraries_warnings_are_lines_of_the_same_kind_and_what_is_less_is_none(capsys, form, name):
    library = logging.getLogger(name.partition(".")[0])
    logs.to_stderr("debug", form)
    if library.name in logs.TALKERS:
        library.handlers, library.propagate = [logging.StreamHandler()], False  # as transformers does it
        logs.adopt_libraries()
    say(name, logging.INFO, "not this")
    say(name, logging.WARNING, "but this")
    (line,) = capsys.readouterr().err.splitlines()
    if form == "json":
        assert json.loads(line)["message"] == "but this"
    else:
        assert re.fullmatch(rf"\S+ \S+ WARNING {name}: but this", line)


def test_in_json_pythons_own_warnings_are_lines_too(capsys):
    logs.to_stderr("info", "json")
    warnings.warn("it is old", DeprecationWarning, stacklevel=1)
    (line,) = objects(capsys.readouterr().err)
    assert line["logger"] == "py.warnings"
    assert "it is old" in line["message"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_is_told_with_its_place_and_its_cause(capsys, form):
    logs.to_stderr("info", form)
    try:
        try:
            raise KeyError("the cause")
        except KeyError as err:
            raise StepFailed("the effect") from err
    except StepFailed:
        logging.getLogger("service.app").exception("it failed")
    text = capsys.readouterr().err
    if form == "json":
        (line,) = objects(text)
        text = line["exception"]
    assert text.index("KeyError: 'the cause'") < text.index("service.engine.types.StepFailed: the effect")
    assert text.count("test_logs.py") == 2


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (ValueError(CANARY), False),
        (TemplateRefused(CANARY), False),
        (UnicodeEncodeError("ascii", CANARY, 0, 1, CANARY), False),
        (StepFailed("the device said no"), True),
    ],
)
def test_within_a_request_an_exceptions_message_is_shown_only_where_it_cannot_quote(
    capsys, within_a_request, form, error, shown
):
    logs.to_stderr("debug", form)
    logging.getLogger("service.api.errors").error("it failed", exc_info=error)
    text = capsys.readouterr().err
    assert type(error).__name__ in text
    assert ("the device said no" in text) == shown
    assert CANARY not in text


@pytest.mark.parametrize("form", ["text", "json"])
def test_no_line_has_a_prompt_an_answer_or_a_key_in_it(running, scripted, capsys, form, until):
    """Whatever is asked, whatever goes wrong, at the level that tells most."""
    logs.to_stderr("debug", form)
    words = [{"role": "user", "content": f"say {CANARY}"}]
    answers = scripted(pieces=(CANARY, "!"))
    with running(answers, log_level="debug", log_format=form, api_key=[f"{CANARY}-key"]) as live:
        key = {"authorization": f"Bearer {CANARY}-key"}
        assert CANARY in live.post(headers=key, messages=words).text
        assert CANARY in live.post(headers=key, messages=words, stream=True).text
        url = f"{live.url}/v1/chat/completions"
        refused = [
            live.post(headers={"authorization": f"Bearer {CANARY}"}, messages=words),
            live.post(headers=key, messages=words, model=CANARY),
            live.post(headers=key, messages=words, stop=[CANARY] * 99),
            live.post(headers=key, messages=[{"role": CANARY, "content": CANARY}]),
            live.post(headers=key, messages=words, tools=[{"type": CANARY}]),
            live.post(headers=key, messages=words, user=CANARY, response_format={"type": CANARY}),
            httpx.post(url, headers={**key, "content-type": "application/json"}, content=f'{{"{CANARY}'),
            httpx.get(f"{live.url}/v1/models?x={CANARY}", headers=key),
        ]
        assert {response.status_code for response in refused} <= {200, 400, 401, 404}
        live.template.encode = lambda _messages: {}[CANARY]
        assert live.post(headers=key, messages=words).status_code == 500
        live.template.encode = lambda _messages: (1, 2)
        answers.raise_at, answers.error = 0, RuntimeError(f"no such word: {CANARY}")
        assert live.post(headers=key, messages=words).status_code == 500
        answers.raise_at = 1  # after the first byte
        assert "internal_error" in live.post(headers=key, messages=words, stream=True).text
        until(lambda: sum(live.service.responses.values()) == 13, "the last line")
    text = capsys.readouterr().err
    assert text.count("a request failed") == 3
    assert text.count("/v1/chat/completions") >= 12
    assert CANARY not in text
    if form == "json":
        access = [line for line in objects(text) if line["logger"] == "service.access"]
        assert len(access) == 13
        assert all({"request_id", "method", "path", "status", "seconds"} <= line.keys() for line in access)
        failed = [line for line in objects(text) if "exception" in line]
        assert {line["request_id"] for line in failed} <= {line["request_id"] for line in access}


class Uncountable(Counter):
    def __missing__(self, status):
        raise KeyError(CANARY)


LEFT_OUT = "KeyError (its message is left out: it may quote the request)"


@pytest.fixture
def read(capsys, until):
    """`read(text)` is stderr as soon as `text` is in it, to the end of the line."""

    def wait(text):
        seen = []

        def there():
            seen.append(capsys.readouterr().err)
            return text in "".join(seen) and "".join(seen).endswith("\n")

        until(there, text)
        return "".join(seen)

    return wait


@pytest.mark.parametrize("form", ["text", "json"])
def test_what_uvicorn_logs_after_us_has_no_prompt_in_it_either(live, form, read):
    """Nothing of ours catches what the outermost middleware raises."""
    logs.to_stderr("debug", form)
    live.service.responses = Uncountable()
    live.post()
    text = read(LEFT_OUT)
    live.service.responses = Counter()
    assert "uvicorn.error" in text
    assert CANARY not in text
    if form == "json":
        (line,) = [line for line in objects(text) if line["logger"] == "uvicorn.error"]
        assert line["exception"].endswith(LEFT_OUT)
        assert line["request_id"]


async def fails():
    {}[CANARY]


def fails_with(_text):
    {}[CANARY]


@pytest.mark.parametrize("form", ["text", "json"])
@pytest.mark.parametrize(
    ("go_wrong", "words"),
    [
        (lambda loop: loop.create_task(fails()), "Task exception was never retrieved"),
        (lambda loop: loop.call_soon(partial(fails_with, CANARY)), "Exception in callback"),
    ],
    ids=["task", "callback"],
)
def test_what_asyncio_logs_has_no_prompt_in_it_either(running, scripted, form, read, go_wrong, words):
    """Its own words have the task's exception and the callback's arguments in them."""

    class Careless(scripted):
        async def generate(self, request):
            go_wrong(asyncio.get_running_loop())
            async for event in super().generate(request):
                yield event

    logs.to_stderr("debug", form)
    with running(Careless()) as live:
        assert live.post().status_code == 200
        gc.collect()
        text = read(LEFT_OUT)
    assert words in text
    assert CANARY not in text
    assert "test_logs.py" in text
