"""A rolling restart behind a real proxy: scripted services as processes, real HTTP, the official SDK.

benchmarks/rolling.py does the same with the built-in model, and shows what fails where a proxy knows less.
"""

import socket
import sys
from pathlib import Path

import pytest

from benchmarks import proxy, rolling
from benchmarks.proxy import NotInstalled
from benchmarks.replica import Replica
from benchmarks.rolling import MUST, holds, measure, replicas

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
SCRIPTED = Path(__file__).with_name("serve_scripted.py")


@pytest.mark.parametrize("way", ["told-nginx", "readiness-haproxy"])
def test_no_request_fails_while_each_replica_is_replaced(way, tmp_path):
    started = []

    def start():
        started.append(Replica([str(SCRIPTED)], tmp_path / "replicas.log"))
        return started[-1]

    try:
        row = measure(way, start, tmp_path, clients=6, delay=0.5, calm=0.3, model="counting")
    except NotInstalled as reason:
        pytest.skip(str(reason))
    assert row["failures"] == {}
    assert row["requests"] > 20
    assert 0 < row["streamed"] < row["requests"]
    assert len({replica.port for replica in started}) == 4, "both were replaced"


def test_a_way_that_must_hold_does_not_hold_unseen(monkeypatch, capsys):
    def not_there(*_, **__):
        raise NotInstalled("apt-get install nginx-light")

    monkeypatch.setattr(rolling, "measure", not_there)
    monkeypatch.setattr(sys, "argv", ["rolling", "--ways", "told-nginx"])
    with pytest.raises(SystemExit) as ended:
        rolling.main()
    assert ended.value.code == 1
    assert "skipped told-nginx: apt-get install nginx-light" in capsys.readouterr().out


def test_only_ways_that_must_hold_decide():
    seen = [{"way": way, "failed": 0} for way in MUST]
    assert holds(MUST, seen)
    assert holds([*MUST, "readiness-tcp"], [*seen, {"way": "readiness-tcp", "failed": 3}])
    assert not holds(MUST, [{**seen[0], "failed": 1}, *seen[1:]])


def test_replicas_that_were_started_are_stopped_when_the_next_one_cannot_be(tmp_path):
    started = []

    def start():
        if started:
            raise OSError("no more processes")
        started.append(Replica(["-c", "import time; time.sleep(60)"], tmp_path / "log"))
        return started[-1]

    with pytest.raises(OSError, match="no more processes"), replicas(start, 2):
        pass
    assert started[0].process.poll() is not None


def test_a_proxy_that_does_not_come_to_listen_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(proxy, "START_SECONDS", 0.1)
    silent = proxy._Running("sleep", "coreutils", tmp_path)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody else comes to listen there meanwhile
        silent.port = held.getsockname()[1]
        with pytest.raises(SystemExit, match="sleep did not start"):
            silent.start("60")
    assert silent._process.poll() is not None
