"""What wraps every request: ids, the order of refusals, the size of bodies, and who is counted."""

import socket
import threading
from http.client import HTTPResponse

import httpx
import pytest
from starlette.responses import StreamingResponse

DEADLINE_S = 10
CHAT = "/v1/chat/completions"
KEY = {"authorization": "Bearer k1"}


@pytest.fixture
def limited(running):
    with running(max_body_bytes=1024) as live:
        yield live


def raw(live, head, body=b""):
    """Send these bytes and no more; the status and the body that come back."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), DEADLINE_S) as client:
        client.sendall(head.encode() + b"\r\nhost: x\r\n\r\n" + body)
        answer = HTTPResponse(client)
        answer.begin()
        return answer.status, answer.read()


def test_a_clients_own_id_is_kept(live):
    for given in ("a", "trace-1:a/b", "0af7651916cd43dd8448eb211c80319c", "A=b+c@d.e_f", "x" * 128):
        assert live.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given


def test_an_id_that_could_harm_a_log_is_replaced(live):
    for given in ("", "a b", "x" * 129, "a;b", "a\tb", '"a"', "<a>", "a%0ab", "{}", "é"):
        response = live.get("/health", headers={"x-request-id": given.encode("latin-1")})
        (replaced,) = response.headers.get_list("x-request-id")
        assert replaced.startswith("req_"), given


def test_every_refusal_has_the_id_too(running):
    with running(api_key=["k1"], max_body_bytes=1024) as live:
        given = {"x-request-id": "mine"}
        refusals = [
            live.get("/v1/models", headers=given),
            live.post(headers={**given, **KEY}, messages=[{"role": "user", "content": "x" * 2000}]),
            live.post(headers={**given, **KEY}, model="other"),
            live.get(CHAT, headers={**given, **KEY}),
        ]
        assert [response.status_code for response in refusals] == [401, 413, 404, 405]
        assert [response.headers["x-request-id"] for response in refusals] == ["mine"] * 4


def test_the_access_log_tells_probes_from_requests(live, service_log, until):
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        live.get(path, headers={"x-request-id": "r"})

    def lines():
        return [record for record in service_log.records if record.name == "service.access"]

    until(lambda: len(lines()) == 4, "the last line, which is written when the answer is out,")
    words = [(line.levelname, *line.getMessage().split()) for line in lines()]
    assert [(level, path, status, request_id) for level, _, path, status, *_, request_id in words] == [
        ("DEBUG", "/health", "200", "r"),
        ("DEBUG", "/ready", "200", "r"),
        ("DEBUG", "/metrics", "200", "r"),
        ("INFO", "/v1/models", "200", "r"),
    ]


def test_a_body_of_exactly_the_limit_is_read_and_one_byte_more_is_not(limited):
    for size, status in ((1024, 400), (1025, 413)):
        body = b"x" * size  # no JSON, so 400 says that it was read
        declared = httpx.post(limited.url + CHAT, content=body, timeout=DEADLINE_S)
        chunked = httpx.post(limited.url + CHAT, content=iter([body[:1000], body[1000:]]), timeout=DEADLINE_S)
        assert "content-length" not in chunked.request.headers
        assert (declared.status_code, chunked.status_code) == (status, status)


def test_a_declared_length_is_refused_before_the_body_is_sent(limited):
    status, body = raw(limited, f"POST {CHAT} HTTP/1.1\r\ncontent-length: 1000000000")
    assert status == 413
    assert b"request_too_large" in body


def test_a_body_without_end_is_refused_when_it_has_grown_past_the_limit(limited):
    chunk = b"400\r\n" + b"x" * 1024 + b"\r\n"
    status, _ = raw(limited, f"POST {CHAT} HTTP/1.1\r\ntransfer-encoding: chunked", chunk * 2)
    assert status == 413


def test_a_length_that_is_no_number_is_no_way_around_the_limit(limited):
    for length in ("-1", "1e9", "0x10", "12 34", "１２"):
        head = f"POST {CHAT} HTTP/1.1\r\ncontent-length: {length}"
        assert raw(limited, head, b"x" * 2000)[0] == 400, length
    assert limited.post().status_code == 200


def test_the_limit_holds_on_every_path(limited):
    for path in ("/nowhere", "/v1/models", "/health"):
        assert httpx.post(limited.url + path, content=b"x" * 2000, timeout=DEADLINE_S).status_code == 413


def test_a_stranger_learns_of_nothing_but_the_missing_key(running, until):
    with running(api_key=["k1"], max_body_bytes=1024, drain_seconds=1000) as live, live.service.answering():
        big = [{"role": "user", "content": "x" * 2000}]
        live.signal()
        until(lambda: live.service.draining, "draining")
        assert live.post(messages=big).status_code == 401
        assert live.post(messages=big, headers=KEY).status_code == 413
        assert live.post(headers=KEY).status_code == 503


def test_the_gate_is_closed_for_every_path_but_the_probes(running, until):
    with running(drain_seconds=1000) as live, live.service.answering():
        live.signal()
        until(lambda: live.service.draining, "draining")
        for path in ("/v1/models", "/openapi.json", "/nowhere"):
            assert live.get(path).json()["error"]["code"] == "draining"


def test_a_request_is_counted_until_its_last_byte_and_a_probe_never(running, scripted, until):
    with running(scripted(hold_at=1)) as live:
        assert live.service.active == 0
        with httpx.stream("POST", live.url + CHAT, json=live.ask(stream=True), timeout=DEADLINE_S) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            live.get("/metrics")
            assert live.service.active == 1
            live.engine.release()
        until(lambda: not live.service.active, "the end of the request")


def test_a_request_that_fails_is_counted_out(running, scripted, until):
    with running(scripted(raise_at=0, error=RuntimeError("boom"))) as live:
        assert [live.post(stream=stream).status_code for stream in (False, True)] == [500, 500]
        until(lambda: not live.service.active, "the end of the requests")


def test_an_error_after_the_status_breaks_the_connection_off_and_keeps_the_server(build, service_log):
    """A half answer must not look like a whole one, and a second status cannot be sent."""

    async def half():
        yield b"half"
        raise RuntimeError("boom")

    async def endpoint():
        return StreamingResponse(half())

    live = build()
    live.app.add_api_route("/half", endpoint)
    live.start()
    try:
        with pytest.raises(httpx.RemoteProtocolError):
            live.get("/half")
        (told,) = (
            record for record in service_log.records if record.name == "uvicorn.error" and record.exc_info
        )
        assert str(told.exc_info[1]) == "boom", "and not that a second status was tried"
        assert live.get("/health").status_code == 200
        assert live.service.active == 0
    finally:
        live.stop()


def test_requests_beside_each_other_keep_their_own_ids(running, scripted, until):
    with running(scripted(hold_at=0)) as live:
        given, answers = [f"id-{i}" for i in range(8)], {}

        def ask(request_id):
            answers[request_id] = live.post(headers={"x-request-id": request_id}).headers["x-request-id"]

        threads = [threading.Thread(target=ask, args=(request_id,)) for request_id in given]
        for thread in threads:
            thread.start()
        until(lambda: live.engine.running == 8, "eight at once")
        live.engine.release()
        for thread in threads:
            thread.join(DEADLINE_S)
        assert answers == {request_id: request_id for request_id in given}
