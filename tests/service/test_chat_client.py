import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from service.chat_server import progress
from service.openai_client import ChatApi, ServerError, is_loopback, sse_data

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.upper().startswith("SNUGFIT_")}
EMOJI = "你好 \U0001f642\u2028\u0085fin"
DEADLINE_S = 20


class Handler(BaseHTTPRequestHandler):
    """Answers by what the user's last message says; `server.bodies` keeps every request."""

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("authorization"))
        said = body["messages"][-1]["content"]
        if said == "refuse":
            self.answer(400, {"error": {"message": "no such thing", "type": "invalid_request_error"}})
        elif said == "full":
            self.answer(429, {"error": {"message": "too many wait"}}, {"retry-after": "7"})
        else:
            self.stream(said)

    def answer(self, status, body, headers=None):
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def stream(self, said):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        if said == "endless":
            return self.stream_until_closed()
        self.wfile.write(b": keep-alive\r\n\r\n")
        if said == "fail":
            return self.event({"error": {"message": "the engine died"}})
        for piece in EMOJI if said == "emoji" else f"you said {said}":
            self.event({"choices": [{"delta": {"content": piece}, "finish_reason": None}]})
        if said != "cut":
            self.event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
            self.event({"choices": [], "usage": {"completion_tokens": 5}})
            self.wfile.write(b"data: [DONE]\n\n")

    def stream_until_closed(self):
        try:
            while True:
                self.event({"choices": [{"delta": {"content": "on "}}]})
                time.sleep(0.005)
        except OSError:
            self.server.closed.set()

    def event(self, body):
        """In two writes that break inside of a character when there is one."""
        data = b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
        middle = next((i for i, byte in enumerate(data) if byte > 127), 3) + 1
        for part in (data[:middle], data[middle:]):
            self.wfile.write(part)
            self.wfile.flush()

    def log_message(self, *_):
        """Quiet."""


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        server.bodies, server.keys, server.closed = [], [], threading.Event()
        server.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def chat(url, text, *flags, **environment):
    return subprocess.run(
        [sys.executable, "-m", "service", "chat", *(["--url", url] if url else []), *flags],
        input=text, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60,
        env={**CLEAN, **environment},
    )  # fmt: skip


def test_every_line_of_a_pipe_is_a_turn_of_one_conversation(server):
    done = chat(server.url, "one\n\ntwo\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "you said one\nyou said two\n", "")
    assert [(m["role"], m["content"]) for m in server.bodies[1]["messages"]] == [
        ("user", "one"), ("assistant", "you said one"), ("user", "two"),
    ]  # fmt: skip
    assert server.bodies[0]["model"] == "first"
    assert "temperature" not in server.bodies[0]


def test_text_arrives_whole_however_it_is_cut_and_whatever_it_holds(server):
    done = chat(server.url, "emoji\n", PYTHONIOENCODING="cp1252")
    assert done.stdout == EMOJI + "\n"


def test_what_the_user_writes_reaches_the_server_as_utf_8(server):
    chat(server.url, "früh 早 \U0001f642\n", PYTHONIOENCODING="cp1252")
    assert server.bodies[0]["messages"][0]["content"] == "früh 早 \U0001f642"


def test_flags_become_fields_of_the_request(server):
    chat(
        server.url, "x\n", "--model", "second", "--system", "be brief",
        "--temperature", "0", "--max-tokens", "9", "--api-key", "k1",
    )  # fmt: skip
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("second", 0, 9)
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert server.keys == ["Bearer k1"]


def test_the_key_of_the_server_on_the_same_machine_is_found_in_the_environment(server):
    chat(server.url, "x\n", SNUGFIT_API_KEY="k2,k3")
    assert server.keys == ["Bearer k2"]


def test_reset_forgets_and_system_sets_and_exit_leaves(server):
    done = chat(server.url, "one\n/reset\ntwo\n/system be kind\nthree\n/help\n/exit\nfour\n")
    assert [len(body["messages"]) for body in server.bodies] == [1, 1, 2]
    assert server.bodies[2]["messages"][0]["content"] == "be kind"
    assert "/reset" in done.stdout


@pytest.mark.parametrize(
    ("said", "words", "code"),
    [
        ("refuse", "400: no such thing", 42),
        ("full", "429: too many wait (try again in 7 s)", 75),
        ("fail", "the engine died", 75),
        ("cut", "closed the stream before the answer was complete", 75),
    ],
)
def test_an_error_of_the_server_is_told_in_its_words_and_ends_a_script(server, said, words, code):
    done = chat(server.url, f"{said}\nnever\n")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code
    assert len(server.bodies) == 1


def test_a_url_where_nobody_answers_says_how_to_start_a_server():
    done = chat("http://127.0.0.1:9", "x\n")
    assert done.returncode == 75
    assert "snugfit serve" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [["--url", "127.0.0.1:8000"], ["--url", "http://x", "--budget", "3GB"]])
def test_flags_that_make_no_sense_are_refused_before_anything_is_asked(flags):
    done = chat(None, "", *flags)
    assert done.returncode == 2
    assert done.stderr.startswith("snugfit: error: --url")


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a Unix thing")
def test_ctrl_c_on_a_terminal_stops_the_answer_but_not_the_chat(server):
    import pty

    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(sys.executable, [sys.executable, "-m", "service", "chat", "--url", server.url], CLEAN)
    read_until(terminal, b"\n> ")
    os.write(terminal, b"endless\n")
    read_until(terminal, b"on on on")
    os.write(terminal, b"\x03")
    read_until(terminal, b"stopped")
    assert server.closed.wait(DEADLINE_S), "the request was not closed"
    os.write(terminal, b"hello\n")
    read_until(terminal, b"you said hello", b"5 tokens", b"\n> ")
    assert server.bodies[1]["messages"][1]["content"].startswith("on on"), "what was said is remembered"
    os.write(terminal, b"\x04")
    assert leaves(pid) == 0
    os.close(terminal)


def read_until(terminal, *words):
    """Read a terminal until it has shown `words`, one after the other."""
    seen, deadline = b"", time.monotonic() + DEADLINE_S
    for word in words:
        while word not in seen:
            readable, _, _ = select.select([terminal], [], [], deadline - time.monotonic())
            assert readable, f"waited for {word!r} and saw {seen!r}"
            seen += os.read(terminal, 1024)
        seen = seen.partition(word)[2]


def leaves(pid):
    """The exit code of a child that must end before the deadline; it is killed if it does not."""
    deadline = threading.Timer(DEADLINE_S, os.kill, (pid, signal.SIGKILL))
    deadline.start()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    deadline.cancel()
    return code


def test_the_wait_for_a_server_of_ones_own_says_how_far_loading_is():
    state = {"phase": "reading weights", "done_bytes": 3_200_000_000, "total_bytes": 15_230_000_000}
    assert progress({"status": "loading", "progress": state}) == "reading weights, 3.20 GB of 15.23 GB"
    assert progress({"progress": {"phase": "reading the tokenizer", "done_bytes": 0, "total_bytes": 0}}) == (
        "reading the tokenizer"
    )
    assert progress({}) == "starting"


def test_events_are_found_in_chunks_of_any_size():
    wire = 'data: {"a": "\u2028"}\r\n\r\n: comment\n\nid: 1\ndata:b\n\n'.encode()
    for n in range(1, len(wire)):
        chunks = [wire[i : i + n] for i in range(0, len(wire), n)]
        assert list(sse_data(chunks)) == ['{"a": "\u2028"}'.encode(), b"b"]


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(monkeypatch, server):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with ChatApi(server.url + "/v1/") as api:
        assert api.first_model() == "first"
    assert is_loopback("http://localhost:1")
    assert is_loopback("http://[::1]:1")
    assert not is_loopback("https://example.org")


def test_a_server_that_is_something_else_is_recognised(server):
    with ChatApi(server.url) as api, pytest.raises(ServerError, match="no such thing"):
        list(api.stream({"messages": [{"content": "refuse"}]}))
