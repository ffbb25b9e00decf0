"""Lines of JSON for logs, a bar for a terminal."""

import io
import json

from exporter import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_without_a_terminal_progress_is_lines_of_json(monkeypatch):
    stream, clock = io.StringIO(), iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    with progress.shown(stream) as report:
        for done in range(10):
            report(done, 9, "model.safetensors")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[-1] == {"event": "progress", "done_bytes": 9, "total_bytes": 9, "shard": "model.safetensors"}
    assert 2 <= len(lines) < 9  # not one for each call


def test_on_a_terminal_it_is_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with progress.shown(stream) as report:
        report(5, 10, "model.safetensors")
    assert "model.safetensors" in stream.getvalue()
    assert "{" not in stream.getvalue()


def test_an_event_is_one_line_whatever_is_in_it():
    stream = io.StringIO()
    progress.event(stream, "done", out="模型\n")
    assert json.loads(stream.getvalue()) == {"event": "done", "out": "模型\n"}
    assert stream.getvalue().count("\n") == 1
