"""The probes in every state of a service. Its life as a whole is in tests/service/test_app.py."""

import threading

import httpx
import pytest
import uvicorn

from loader.errors import OverBudget

DEADLINE_S = 10
PROBES = ("/health", "/ready", "/metrics")


class Start:
    """A load that says nothing by itself and fails at `end`."""

    def __init__(self):
        self.progress = None
        self.begun, self.end = threading.Event(), threading.Event()

    def __call__(self, progress):
        self.progress = progress
        self.begun.set()
        assert self.end.wait(10 * DEADLINE_S)
        raise OverBudget("cpu", 1200, 1000, "Report it.")


@pytest.fixture
def start():
    return Start()


@pytest.fixture
def loading(running, start):
    with running(start=start, wait=False) as live:
        assert start.begun.wait(DEADLINE_S)
        yield live
        start.end.set()


@pytest.fixture
def failed(build, start, until):
    """The URL of a service whose load has failed, under a server that does not stop for it."""
    live = build(start=start)
    server = uvicorn.Server(uvicorn.Config(live.app, log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [live._listener]})
    thread.start()
    try:
        start.end.set()
        until(lambda: live.service.error, "the failure")
        yield live.url
    finally:
        server.should_exit = True
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


def probe(url, path, method="GET"):
    return httpx.request(method, url + path, timeout=DEADLINE_S)


def test_before_loading_has_said_anything_the_numbers_are_0(loading):
    assert loading.get("/ready").json() == {
        "status": "loading",
        "model": "lab/tiny",
        "progress": {"phase": "starting", "done_bytes": 0, "total_bytes": 0},
    }


def test_progress_is_what_loading_said_last(loading, start):
    seen = []
    for phase, done in (("reading weights", 10), ("reading weights", 20), ("rehearsing", None)):
        start.progress.enter(phase)
        if done is not None:
            start.progress(done, 40)
        seen.append(loading.get("/ready").json()["progress"])
    assert seen == [
        {"phase": "reading weights", "done_bytes": 10, "total_bytes": 40},
        {"phase": "reading weights", "done_bytes": 20, "total_bytes": 40},
        {"phase": "rehearsing", "done_bytes": 0, "total_bytes": 0},
    ]


def test_not_ready_says_when_to_ask_again(loading):
    response = loading.get("/ready")
    assert response.status_code == 503
    assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("5", "5000")


def test_ready_is_200_without_a_wait_and_without_keys_that_do_not_apply(live):
    response = live.get("/ready")
    assert response.status_code == 200
    assert "retry-after" not in response.headers
    assert response.json().keys() == {"status", "model"}


def test_head_has_the_status_of_get_and_no_body(live):
    for alive in (True, False):
        live.engine.alive = alive
        for path in ("/health", "/ready"):
            head, get = probe(live.url, path, "HEAD"), probe(live.url, path)
            assert head.status_code == get.status_code == (200 if alive else 503)
            assert head.content == b""
            assert head.headers["content-type"] == get.headers["content-type"]


def test_head_says_503_while_loading(loading):
    assert probe(loading.url, "/ready", "HEAD").status_code == 503
    assert probe(loading.url, "/health", "HEAD").status_code == 200


def test_a_probe_takes_nothing_but_questions(live):
    assert [probe(live.url, path, "POST").status_code for path in PROBES] == [405] * 3


def test_a_dead_engine_is_no_more_ready_and_wants_a_restart(live):
    live.engine.alive = False
    assert live.get("/health").json() == {"status": "dead"}
    ready = live.get("/ready")
    assert (ready.status_code, ready.json()) == (503, {"status": "dead", "model": "lab/tiny"})


def test_an_engine_that_dies_while_the_service_stops_asks_for_no_restart(running, scripted, until):
    with running(scripted(hold_at=1), drain_seconds=1000) as live, live.service.answering():
        live.signal()
        until(lambda: live.service.draining, "draining")
        live.engine.alive = False
        assert live.get("/health").json() == {"status": "ok"}
        assert live.get("/ready").json()["status"] == "draining"


def test_a_failed_load_wants_a_restart_and_says_why(failed):
    health, ready = probe(failed, "/health"), probe(failed, "/ready")
    assert (health.status_code, health.json()) == (503, {"status": "dead"})
    assert ready.status_code == 503
    assert ready.json() == {
        "status": "failed",
        "model": "lab/tiny",
        "error": "cpu: measured 1,200 bytes against a budget of 1,000. Report it.",
    }
    assert probe(failed, "/ready", "HEAD").status_code == 503


def test_a_question_after_a_failed_load_is_told_why(failed):
    response = httpx.post(f"{failed}/v1/chat/completions", json={}, timeout=DEADLINE_S)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (503, "load_failed")
    assert "measured 1,200 bytes" in error["message"]
    assert int(response.headers["retry-after"]) > 0


def test_the_reason_of_a_failure_is_told_until_the_server_has_gone(running, start, until):
    with running(start=start, wait=False, drain_seconds=1000) as live, live.service.answering():
        start.end.set()
        until(lambda: live.service.draining, "stopping")
        assert live.get("/ready").json()["status"] == "failed"


def test_while_it_stops_every_probe_still_answers(running, until):
    with running(drain_seconds=1000) as live, live.service.answering():
        live.signal()
        until(lambda: live.service.draining, "draining")
        assert [live.get(path).status_code for path in PROBES] == [200, 503, 200]
