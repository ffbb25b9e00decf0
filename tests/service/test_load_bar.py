import io

import pytest
from rich.console import Console

from service import load_bar, logs
from service.backend import LoadCancelled
from service.load_bar import shown


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=80)


def test_a_terminal_sees_a_bar_with_the_bytes_read_and_to_read():
    console = terminal()
    with shown(lambda done, total: None, console) as report:
        report(0, 4_000_000)
        report(3_000_000, 4_000_000)
    seen = console.file.getvalue()
    assert "weights" in seen
    assert "3.0/4.0 MB" in seen


@pytest.mark.parametrize("console", [terminal(), Console(file=io.StringIO())], ids=["terminal", "pipe"])
def test_every_report_is_passed_on_and_may_stop_the_load(console):
    seen = []

    def report_to_service(done_bytes, total_bytes):
        seen.append((done_bytes, total_bytes))
        if done_bytes == 2:
            raise LoadCancelled

    with shown(report_to_service, console) as report:
        report(1, 3)
        with pytest.raises(LoadCancelled):
            report(2, 3)
    assert seen == [(1, 3), (2, 3)]


def test_without_a_terminal_the_log_says_how_far_it_is_and_how_fast_it_was(service_log, monkeypatch):
    monkeypatch.setattr(load_bar, "LINE_SECONDS", 0.0)
    console = Console(file=io.StringIO())
    with shown(lambda done, total: None, console) as report:
        report(1_000_000, 2_000_000)
        report(2_000_000, 2_000_000)
    assert console.file.getvalue() == ""
    assert "reading weights: 1.0 MB of 2.0 MB" in service_log.text
    assert "read 2.0 MB of weights in" in service_log.text


def test_where_lines_are_json_there_is_no_bar_between_them_on_a_terminal_either(monkeypatch):
    monkeypatch.setattr(logs, "are_json", lambda: True)
    console = terminal()
    with shown(lambda done, total: None, console) as report:
        report(1, 2)
    assert console.file.getvalue() == ""
