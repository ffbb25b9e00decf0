"""SIGTERM to a real process: drains, refuses, ends with the right code, and leaves a proxy in no doubt."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection

import httpx
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
DEADLINE_S = 20


def ask(max_tokens):
    return {
        "model": "counting",
        "stream": True,
        "max_tokens": max_tokens,
        "messages": [{"role": "user", "content": "count"}],
    }


def wait_until_draining(running):
    deadline = time.monotonic() + DEADLINE_S
    while running.get("/ready").json()["status"] != "draining":
        assert time.monotonic() < deadline


def test_sigterm_finishes_what_runs_refuses_the_rest_and_exits_with_0(program):
    with program() as running:
        url = f"{running.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=ask(60), timeout=DEADLINE_S) as stream:
            lines = (line for line in stream.iter_lines() if line)
            assert "role" in next(lines)
            running.process.send_signal(signal.SIGTERM)
            wait_until_draining(running)
            refused = httpx.post(url, json=ask(1))
            assert refused.status_code == 503
            assert refused.headers["retry-after"]
            received = list(lines)
        assert received[-1] == "data: [DONE]"
        assert '"content":"60 "' in received[-3]
        assert running.process.wait(DEADLINE_S) == 0


def test_an_idle_service_ends_at_once(program):
    with program() as running:
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(5) == 0
        assert "Traceback" not in running.log()


def test_a_second_signal_cuts_off_what_runs(program):
    with program(DRAIN="1000") as running:
        with httpx.stream(
            "POST", f"{running.url}/v1/chat/completions", json=ask(4000), timeout=DEADLINE_S
        ) as stream:
            lines = (line for line in stream.iter_lines() if line)
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            wait_until_draining(running)
            running.process.send_signal(signal.SIGTERM)
            assert '"error"' in list(lines)[-1]
        assert running.process.wait(DEADLINE_S) == 128 + signal.SIGTERM


def test_a_draining_service_closes_the_connections_that_are_kept_open(program):
    """Those that wait for a request at once; the one that is answered after its answer."""
    with program() as running:
        address = running.url.removeprefix("http://")
        idle, busy = (HTTPConnection(address, timeout=DEADLINE_S) for _ in range(2))
        idle.request("GET", "/v1/models")
        assert idle.getresponse().read()
        busy.request("POST", "/v1/chat/completions", json.dumps(ask(100)))
        answer = busy.getresponse()
        assert answer.readline()
        running.process.send_signal(signal.SIGTERM)
        wait_until_draining(running)
        assert idle.sock.recv(1) == b""
        assert b"[DONE]" in answer.read()
        assert busy.sock.recv(1) == b""
        assert running.process.wait(DEADLINE_S) == 0


HEAD = b"GET /v1/models HTTP/1.1\r\nhost: here\r\n\r\n"


@pytest.mark.parametrize("kept", [False, True], ids=["new", "kept open"])
def test_a_request_of_which_a_part_had_come_is_answered(program, kept):
    with program() as running:
        connection = HTTPConnection(running.url.removeprefix("http://"), timeout=DEADLINE_S)
        connection.connect()
        if kept:
            connection.request("GET", "/v1/models")
            assert connection.getresponse().read()
        connection.sock.sendall(HEAD[:20])
        running.get("/health")  # the server has read what came before
        running.process.send_signal(signal.SIGTERM)
        wait_until_draining(running)
        time.sleep(0.3)  # one that does not wait has ended by now
        connection.sock.sendall(HEAD[20:])
        answer = b"".join(iter(lambda: connection.sock.recv(10_000), b""))
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"connection: close" in answer
        assert running.process.wait(DEADLINE_S) == 0


def test_a_request_of_which_never_more_comes_is_not_waited_for_longer_than_those_that_run(program):
    with program(DRAIN="0.5") as running:
        connection = HTTPConnection(running.url.removeprefix("http://"), timeout=DEADLINE_S)
        connection.connect()
        connection.sock.sendall(HEAD[:20])
        running.get("/health")
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(5) == 0
        assert "1 requests are cut off" in running.log()


def test_what_is_answered_while_draining_ends_its_connection(program):
    with program() as running:
        url = f"{running.url}/v1/chat/completions"
        assert running.get("/ready").headers.get("connection") != "close"
        with httpx.stream("POST", url, json=ask(4000), timeout=DEADLINE_S) as stream:
            lines = stream.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            wait_until_draining(running)
            for response in (httpx.post(url, json=ask(1)), running.get("/ready"), running.get("/health")):
                assert response.headers["connection"] == "close"


PROXY = """
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off;
  client_body_temp_path {folder}; proxy_temp_path {folder};
  fastcgi_temp_path {folder}; uwsgi_temp_path {folder}; scgi_temp_path {folder};
  upstream replicas {{ server {first} max_fails=0; server {second} max_fails=0; keepalive 32; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://replicas; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
      proxy_next_upstream error http_503 non_idempotent;
    }}
  }}
}}
"""


@contextmanager
def proxy(folder, first, second):
    """nginx before two replicas; it asks the other one when one refuses or has gone."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    replicas = {"first": first.url.removeprefix("http://"), "second": second.url.removeprefix("http://")}
    (folder / "nginx.conf").write_text(PROXY.format(folder=folder, port=port, **replicas))
    server = subprocess.Popen(["nginx", "-c", folder / "nginx.conf", "-p", folder], stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(DEADLINE_S)


def wait_until_there(url):
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            return httpx.get(f"{url}/ready")
        except httpx.TransportError:
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_behind_a_proxy_no_request_fails_when_one_of_two_replicas_is_stopped(program, tmp_path):
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed: failing over is NOT tested; apt-get install nginx-light")
    answers, errors, stop = [], [], threading.Event()

    def ask_on(url):
        with httpx.Client(timeout=DEADLINE_S) as client:
            while not stop.is_set():
                try:
                    with client.stream("POST", f"{url}/v1/chat/completions", json=ask(5)) as response:
                        answers.append((response.status_code, response.read().count(b"[DONE]")))
                except httpx.HTTPError as err:
                    errors.append(repr(err))

    with ExitStack() as opened:
        first, second = opened.enter_context(program()), opened.enter_context(program())
        url = opened.enter_context(proxy(tmp_path, first, second))
        wait_until_there(url)
        clients = [threading.Thread(target=ask_on, args=(url,)) for _ in range(8)]
        for client in clients:
            client.start()
        time.sleep(1)
        first.process.send_signal(signal.SIGTERM)
        assert first.process.wait(DEADLINE_S) == 0
        before = len(answers)
        time.sleep(1)
        stop.set()
        for client in clients:
            client.join(DEADLINE_S)
    assert (errors, set(answers)) == ([], {(200, 1)})
    assert len(answers) > before > 8
