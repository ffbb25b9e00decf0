"""Lines of JSON for logs, a bar for a terminal."""

import io
import json
import os
import subprocess
import sys

from exporter import progress
from exporter.progress import Bar, JsonLines


def test_for_a_program_progress_is_lines_of_json_and_not_one_for_each_call(monkeypatch):
    stream, clock = io.StringIO(), iter(range(0, 1000, 2))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = JsonLines(stream)
    for done in range(10):
        lines.progress(done, 9, "model.safetensors")
    lines.say("looking")
    found = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert found[-2] == {"event": "progress", "done_bytes": 9, "total_bytes": 9, "shard": "model.safetensors"}
    assert found[-1] == {"event": "note", "text": "looking"}
    assert 3 <= len(found) < 10


def test_for_a_person_it_is_a_bar(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    with Bar(stream) as bar:
        bar.progress(5, 10, "model.safetensors")
        bar.say("looking")
    assert "model.safetensors" in stream.getvalue()
    assert "looking" in stream.getvalue()
    assert "{" not in stream.getvalue()


def test_an_event_is_one_line_of_ascii_whatever_is_in_it():
    stream = io.StringIO()
    progress.event(stream, "done", out="模型\n")
    assert json.loads(stream.getvalue()) == {"event": "done", "out": "模型\n"}
    assert stream.getvalue().isascii()
    assert stream.getvalue().count("\n") == 1


def test_a_reader_that_has_left_does_not_end_the_export():
    code = (
        "import sys, time; from exporter.progress import event\n"
        "sys.stdin.read()\n"
        "for n in range(3): event(sys.stdout, 'progress', n=n)\n"
        "print('went on', file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == "went on\n"
    assert process.returncode == 0
