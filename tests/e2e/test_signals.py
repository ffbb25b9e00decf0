"""SIGTERM to a real process: drains, refuses, ends with the right code."""

import signal
import sys
import time

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
