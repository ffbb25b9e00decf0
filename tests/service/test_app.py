"""The life of a service seen from outside: loading, ready, draining, dead."""

import asyncio
import json
import socket
import threading
from contextlib import ExitStack

import httpx
import openai
import pytest

from loader.errors import OverBudget
from service.backend import Backend, LoadCancelled
from service.prompt.defaults import GenerationDefaults


@pytest.fixture
def slow_load():
    """A `start` that reports half of the bytes and waits to be released or cancelled."""

    class Slow:
        def __init__(self):
            self.waiting, self.release, self.cancelled = threading.Event(), threading.Event(), False

        def __call__(self, progress):
            progress.enter("reading weights")
            self.waiting.set()
            try:
                while not self.release.wait(0.005):
                    progress(500, 1000)
            except LoadCancelled:
                self.cancelled = True
                raise
            raise OverBudget("cpu", 1200, 1000, "Report it.")

    return Slow()


def test_while_loading_it_is_healthy_and_not_ready_and_tells_how_far_it_is(running, slow_load, until):
    with running(start=slow_load, wait=False) as live:
        slow_load.waiting.wait(10)
        until(lambda: live.service.progress.state.done_bytes, "progress")
        assert (live.get("/health").status_code, live.get("/health").json()) == (200, {"status": "ok"})
        ready = live.get("/ready")
        assert ready.status_code == 503
        assert ready.json() == {
            "status": "loading",
            "model": "lab/tiny",
            "progress": {"phase": "reading weights", "done_bytes": 500, "total_bytes": 1000},
        }
        for response in (live.post(), live.get("/v1/models")):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "model_loading"
            assert "500 of 1,000 bytes" in response.json()["error"]["message"]
            assert int(response.headers["retry-after"]) > 0
        assert "snugfit_ready 0.0" in live.get("/metrics").text


def test_stopping_while_loading_cancels_the_load(running, slow_load):
    with running(start=slow_load, wait=False) as live:
        slow_load.waiting.wait(10)
        live.signal()
        live.wait_until_ended()
    assert slow_load.cancelled
    assert live.server.exit_code == 0


def test_a_load_that_fails_ends_the_server_and_keeps_the_reason(running, slow_load):
    with running(start=slow_load, wait=False) as live:
        slow_load.release.set()
        live.wait_until_ended()
    assert isinstance(live.service.error, OverBudget)
    assert live.service.error.exit_code == 43


def test_when_ready_both_probes_are_200(live):
    assert live.get("/health").json() == {"status": "ok"}
    assert live.get("/ready").json() == {"status": "ready", "model": "lab/tiny"}
    assert live.get("/ready").status_code == 200
    assert httpx.head(f"{live.url}/health").status_code == 200


def test_a_dead_engine_asks_to_be_restarted(live):
    live.engine.alive = False
    assert live.get("/health").status_code == 503
    assert live.get("/ready").json()["status"] == "dead"
    response = live.post()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_dead")
    assert response.headers["retry-after"] == "30"


def test_a_dying_engine_fails_what_it_was_answering(running, scripted, until):
    with running(scripted(hold_at=1)) as live:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(live.post(stream=True).text))
        thread.start()
        until(lambda: live.engine.running, "the first token")
        live.engine.alive = False
        thread.join(10)
        assert json.loads(answers[0].split("data: ")[-1])["error"]["code"] == "engine_dead"


def test_draining_finishes_what_runs_and_refuses_the_rest(running, scripted, until):
    with running(scripted(hold_at=1)) as live:
        with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=live.ask(stream=True)) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            live.signal()
            until(lambda: live.service.draining, "draining")
            refused = live.post()
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert int(refused.headers["retry-after"]) > 0
            assert live.get("/ready").json()["status"] == "draining"
            assert live.get("/ready").status_code == 503
            assert live.get("/health").status_code == 200
            live.engine.release()
            assert [line for line in lines if line][-1] == "data: [DONE]"
        live.wait_until_ended()
        assert live.server.exit_code == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", live.url.rpartition(":")[2]))


def test_what_outlasts_the_drain_limit_is_told_so(running, scripted, until):
    with running(scripted(hold_at=1), drain_seconds=0.1) as live:
        with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=live.ask(stream=True)) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            live.signal()
            assert '"code":"engine_dead"' in [line for line in lines if line][-1]
        live.wait_until_ended()
        assert live.server.exit_code == 0


def test_a_second_signal_does_not_wait(running, scripted, until):
    with running(scripted(hold_at=0), drain_seconds=1000) as live:
        thread = threading.Thread(target=live.post)
        thread.start()
        until(lambda: live.engine.running, "the request")
        live.signal(2)
        until(lambda: live.service.draining, "draining")
        live.signal(2)
        live.wait_until_ended()
        thread.join(10)
        assert live.server.exit_code == 130


def test_closing_gives_back_in_reverse_order_and_survives_a_failure(service_log):
    closed = []
    opened = ExitStack()
    opened.callback(closed.append, "model")
    opened.callback(lambda: 1 // 0)
    opened.callback(closed.append, "engine")
    Backend(None, None, 64, GenerationDefaults(), 0, "float32", opened=opened).close()
    assert closed == ["engine", "model"]
    assert "ZeroDivisionError" in service_log.text


def test_what_fails_to_close_keeps_nothing_else_open(build):
    closed = []

    class Traces:
        tracer = None

        async def close(self):
            closed.append("traces")

    async def fail():
        closed.append("service")
        raise OSError("no thread can be started")

    async def run(app):
        async with app.router.lifespan_context(app):
            pass

    live = build(start=lambda _progress: None, tracing=Traces())
    live.service.load_in_background, live.service.close = lambda: None, fail
    live.app.state.metrics.close = lambda: closed.append("metrics")
    with pytest.raises(OSError, match="no thread"):
        asyncio.run(run(live.app))
    assert closed == ["service", "metrics", "traces"]


def test_the_model_is_listed_and_found_by_an_id_with_a_slash(live):
    client = live.client()
    assert [model.id for model in client.models.list()] == ["lab/tiny"]
    model = client.models.retrieve("lab/tiny")
    assert (model.id, model.object, model.created, model.owned_by) == (
        "lab/tiny",
        "model",
        1_700_000_000,
        "snugfit",
    )
    assert model.max_model_len == 64
    assert live.get("/v1/models/lab/tiny").json() == model.to_dict()
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("other")
    assert refused.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "not_found"), ("GET", "/v1/chat/completions", 405, "method_not_allowed")],
)
def test_what_the_router_refuses_has_the_same_shape(live, method, path, status, code):
    response = httpx.request(method, live.url + path)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("invalid_request_error", code, None)
    assert response.headers["x-request-id"]
    assert status != 405 or response.headers["allow"] == "POST"


def test_a_sane_request_id_is_returned_and_any_other_replaced(live):
    assert live.post(headers={"x-request-id": "trace-1:a/b"}).headers["x-request-id"] == "trace-1:a/b"
    assert live.post(stream=True, headers={"x-request-id": "s1"}).headers["x-request-id"] == "s1"
    assert live.post(n=5, headers={"x-request-id": "e1"}).headers["x-request-id"] == "e1"
    for bad in ("a b", "x" * 129, "é", ""):
        given = live.post(headers={"x-request-id": bad.encode("latin-1")}).headers["x-request-id"]
        assert given.startswith("req_")
    assert live.get("/health").headers["x-request-id"] != live.get("/health").headers["x-request-id"]


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic k1", "Bearer", "k1", "Bearer k1x"])
def test_without_one_of_the_keys_nothing_but_the_probes_answers(running, header):
    with running(api_key=["k1", "clé"]) as live:
        headers = {"authorization": header} if header else {}
        response = live.post(headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert live.get("/v1/models", headers=headers).status_code == 401
        assert live.get("/nowhere", headers=headers).status_code == 401
        assert [live.get(path).status_code for path in ("/health", "/ready", "/metrics")] == [200, 200, 200]


def test_each_of_the_keys_opens(running):
    with running(api_key=["k1", "clé"]) as live:
        assert live.client(api_key="k1").chat.completions.create(**live.ask()).choices
        assert live.post(headers={"authorization": "bearer clé".encode()}).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            live.client(api_key="k2").models.list()


def test_a_body_over_the_limit_is_refused_declared_or_not(running):
    with running(max_body_bytes=1024) as live:
        declared = live.post(messages=[{"role": "user", "content": "x" * 2000}])
        assert (declared.status_code, declared.json()["error"]["code"]) == (413, "request_too_large")
        assert "1,024 bytes" in declared.json()["error"]["message"]
        chunks = (b"x" * 400 for _ in range(4))
        assert httpx.post(f"{live.url}/v1/chat/completions", content=chunks).status_code == 413
        assert live.post().status_code == 200


def test_no_web_page_of_another_origin_may_call_unless_it_is_listed(running, live):
    preflight = {"origin": "https://a.example", "access-control-request-method": "POST"}
    url = "/v1/chat/completions"
    assert "access-control-allow-origin" not in httpx.options(live.url + url, headers=preflight).headers
    with running(cors_origins=["https://a.example"], api_key=["k"]) as open_one:
        allowed = httpx.options(open_one.url + url, headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://a.example"
        refused = open_one.post(headers={"origin": "https://a.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in refused.headers["access-control-expose-headers"]
        other = open_one.post(headers={"origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


def test_the_log_has_a_line_per_request_and_never_what_was_said(running, scripted, service_log):
    with running(scripted(raise_at=1, error=RuntimeError("boom"))) as live:
        live.post(messages=[{"role": "user", "content": "my secret"}], headers={"x-request-id": "r1"})
        live.post(messages="my secret")
        live.get("/a%0d%0ab")
    lines = [record.getMessage() for record in service_log.records if record.name == "service.access"]
    assert any(line.startswith("POST /v1/chat/completions 500") and line.endswith("r1") for line in lines)
    assert any(line.startswith("GET /a%0D%0Ab 404") for line in lines)
    assert "my secret" not in service_log.text


def test_openapi_describes_the_endpoints(live):
    paths = live.get("/openapi.json").json()["paths"]
    assert {"/v1/chat/completions", "/v1/models", "/v1/models/{id}", "/health", "/ready"} <= set(paths)
    body = paths["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"messages", "model", "max_completion_tokens"} <= set(body["properties"])
