"""A rolling restart behind a real proxy: scripted services as processes, real HTTP, the official SDK.

benchmarks/rolling.py does the same with the built-in model, and shows what fails where a proxy knows less.
"""

import sys
from pathlib import Path

import pytest

from benchmarks.proxy import NotInstalled
from benchmarks.replica import Replica
from benchmarks.rolling import measure

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
