"""EventStream by itself, under a real uvicorn and read byte by byte: an in-process transport would buffer."""

import asyncio
import json
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest
import uvicorn

from service.api.middleware import ErrorBoundary
from service.api.sse import DONE, KEEP_ALIVE, EventStream, frame
from service.engine.types import EngineDead, QueueFull

DEADLINE_S = 10
NEVER, OFTEN = 0.0, 0.01
ONE, TWO = frame(b"1"), frame(b"2")


class Script:
    """A generator of `items`: bytes are frames, an Exception is raised, PAUSE waits for `go_on()`."""

    PAUSE = object()

    def __init__(self, *items):
        self.items = items
        self.given, self.closed = 0, False
        self._go_on = threading.Event()

    def go_on(self):
        self._go_on.set()

    async def frames(self):
        try:
            for item in self.items:
                if item is self.PAUSE:
                    while not self._go_on.is_set():
                        await asyncio.sleep(0.002)
                elif isinstance(item, Exception):
                    raise item
                else:
                    self.given += 1
                    yield item
        finally:
            self.closed = True


class Endless(Script):
    """Frames as fast as they are taken."""

    async def frames(self):
        try:
            while True:
                self.given += 1
                await asyncio.sleep(0)  # as an engine does, from whose thread tokens come
                yield frame(b"x" * 10_000)
        finally:
            self.closed = True


class Stage:
    """One server for all scripts, each under a path of its own, inside the boundary that makes statuses."""

    def __init__(self):
        self._plays, self._kept = {}, []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = self._listener.getsockname()
        self._server = uvicorn.Server(
            uvicorn.Config(ErrorBoundary(self._app), lifespan="off", log_config=None)
        )
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]})
        self._thread.start()

    def play(self, script, keep_alive_s=NEVER, headers=None):
        """The path at which the script will be streamed."""
        path = f"/{len(self._plays)}"
        self._plays[path] = (script, keep_alive_s, headers or {})
        return path

    def get(self, *items, **options):
        """The whole response."""
        return httpx.get(self._url(self.play(Script(*items), **options)), timeout=DEADLINE_S)

    @contextmanager
    def stream(self, *items, **options):
        """A script, and the response to a request for it while it runs."""
        script = Script(*items)
        with httpx.stream("GET", self._url(self.play(script, **options)), timeout=DEADLINE_S) as response:
            yield script, response

    @contextmanager
    def connect(self, script, **options):
        """A bare socket on which the request has been sent."""
        path = self.play(script, **options)
        with socket.create_connection(self.address, DEADLINE_S) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            yield client

    def close(self):
        for script, *_ in self._plays.values():
            script.go_on()
        self._server.should_exit = True
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    def _url(self, path):
        return f"http://127.0.0.1:{self.address[1]}{path}"

    async def _app(self, scope, receive, send):
        script, keep_alive_s, headers = self._plays[scope["path"]]
        frames = script.frames()
        self._kept.append(frames)  # so that only EventStream closes it, and not the garbage collector
        await EventStream(frames, keep_alive_s, headers)(scope, receive, send)


@pytest.fixture(scope="module")
def stage():
    one = Stage()
    yield one
    one.close()


def test_frames_are_sent_as_they_are_and_nothing_is_added(stage):
    response = stage.get(frame(b'{"a": 1}'), frame("你好".encode()), DONE)
    assert response.status_code == 200
    assert response.text == 'data: {"a": 1}\n\ndata: 你好\n\ndata: [DONE]\n\n'


def test_the_headers_keep_proxies_from_collecting_the_stream(stage):
    response = stage.get(DONE, headers={"x-more": "1"})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-more"] == "1"
    assert "content-length" not in response.headers


def test_a_frame_arrives_before_the_next_one_is_made(stage):
    with stage.stream(ONE, Script.PAUSE, TWO) as (script, response):
        chunks = response.iter_raw()
        assert next(chunks) == ONE
        assert script.given == 1
        script.go_on()
        assert b"".join(chunks) == TWO


@pytest.mark.parametrize("items", [(DONE,), (), (EngineDead("ended"),), (ONE, EngineDead("ended"))])
def test_a_generator_is_closed_before_its_response_ends(stage, items):
    with stage.stream(*items) as (script, response):
        response.read()
        assert script.closed


def test_a_generator_without_a_frame_is_an_empty_stream_and_no_error(stage):
    response = stage.get()
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("before", [(), (ONE,)])
def test_silence_is_filled_with_comments_wherever_it_falls(stage, before):
    with stage.stream(*before, Script.PAUSE, DONE, keep_alive_s=OFTEN) as (script, response):
        lines = response.iter_lines()
        beginning = [next(lines) for _ in range(2 * len(before) + 6)]
        assert beginning == [*(["data: 1", ""] if before else []), *[": keep-alive", ""] * 3]
        script.go_on()
        assert [line for line in lines if line.startswith("data")] == ["data: [DONE]"]


def test_an_interval_of_0_means_no_comments(stage):
    """Told by a second stream beside it: when that has had its comments, the first has had none."""
    with (
        stage.connect(Script(ONE, Script.PAUSE), keep_alive_s=NEVER) as silent,
        stage.stream(Script.PAUSE, keep_alive_s=OFTEN) as (talking, response),
    ):
        lines = response.iter_lines()
        assert [next(lines) for _ in range(10)].count(": keep-alive") == 5
        received = b""
        while ONE not in received:
            received += silent.recv(10_000)
        assert b"keep-alive" not in received
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):
            silent.recv(1)
        talking.go_on()


def test_comments_never_break_a_frame(stage):
    frames = [frame(str(i).encode() * 200) for i in range(300)]
    response = stage.get(*frames, DONE, keep_alive_s=1e-6)
    assert response.content.replace(KEEP_ALIVE, b"") == b"".join([*frames, DONE])


def test_the_sdk_takes_no_comment_for_an_event(running, scripted):
    with running(scripted(hold_at=1), keep_alive_seconds=OFTEN) as live:
        chunks = live.client().chat.completions.create(**live.ask(stream=True))
        with httpx.stream("POST", f"{live.url}/v1/chat/completions", json=live.ask(stream=True)) as beside:
            lines = beside.iter_lines()
            assert sum(next(lines) == ": keep-alive" for _ in range(16)) > 3
            live.engine.release()
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello"


def test_an_error_before_the_first_byte_is_a_status(stage):
    response = stage.get(QueueFull(3, 3, 7), headers={"x-more": "1"})
    assert response.status_code == 429
    assert response.headers["content-type"] == "application/json"
    assert response.headers["retry-after"] == "7"
    assert response.json()["error"]["code"] == "queue_full"
    assert "x-more" not in response.headers


def test_an_error_after_a_frame_is_the_last_frame_and_then_the_end(stage):
    response = stage.get(ONE, EngineDead("the engine has ended"), TWO)
    assert response.status_code == 200
    first, error, end = response.text.split("\n\n")
    assert (first, end) == ("data: 1", "")
    assert json.loads(error.removeprefix("data: ")) == {
        "error": {
            "message": "the engine has ended", "type": "server_error", "param": None, "code": "engine_dead",
        }
    }  # fmt: skip


def test_an_error_after_nothing_but_comments_is_a_frame_too_because_the_status_is_out(stage):
    with stage.stream(Script.PAUSE, QueueFull(3, 3, 7), keep_alive_s=OFTEN) as (script, response):
        assert response.status_code == 200
        lines = response.iter_lines()
        assert next(lines) == ": keep-alive"
        script.go_on()
        (data,) = (line for line in lines if line.startswith("data: "))
    assert json.loads(data.removeprefix("data: "))["error"]["code"] == "queue_full"


@pytest.mark.parametrize("before", [(), (ONE,)])
def test_an_unexpected_error_says_nothing_of_itself_before_or_after_the_first_byte(stage, before):
    response = stage.get(*before, RuntimeError("my secret"))
    assert "my secret" not in response.text
    assert "internal_error" in response.text


@pytest.mark.parametrize("keep_alive_s", [NEVER, OFTEN])
@pytest.mark.parametrize("before", [(), (ONE,)])
def test_a_client_that_leaves_closes_the_generator_where_it_waits(stage, until, before, keep_alive_s):
    started = []

    class Waiting(Script):
        async def frames(self):
            started.append(True)
            async for data in Script.frames(self):
                yield data

    script = Waiting(*before, Script.PAUSE, TWO)
    with stage.connect(script, keep_alive_s=keep_alive_s):
        until(lambda: started and script.given == len(before), "starting")
    until(lambda: script.closed, "closing the generator")
    assert script.given == len(before)


def test_a_client_that_reads_nothing_and_leaves_closes_the_generator(stage, until):
    script = Endless()
    with stage.connect(script, keep_alive_s=OFTEN):
        until(lambda: script.given > 10, "the first frames")
        assert not script.closed
    until(lambda: script.closed, "closing the generator")
