"""A Prometheus of one's own on a free port of this machine, and what it answers."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import yaml

from benchmarks.port import free_port

DEADLINE_SECONDS = 60
STEP_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Series:
    """(time, value) pairs of one series, without those that are not finite."""

    labels: Mapping[str, str]
    points: tuple[tuple[float, float], ...]


class Refused(Exception):
    """Prometheus does not take the query; the message is its own."""


def configuration(rules: Path, targets: Mapping[str, str]) -> str:
    """prometheus.yml: the job `snugfit`, scraped every second; `targets` maps instance to host:port."""
    static = [{"targets": [address], "labels": {"instance": name}} for name, address in targets.items()]
    document = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "snugfit", "static_configs": static}],
    }
    return yaml.safe_dump(document, sort_keys=False)


class Prometheus:
    """Started by `with`, ready when the block begins."""

    def __init__(self, configuration: Path, data: Path) -> None:
        address = f"127.0.0.1:{free_port()}"
        self._command = [
            "prometheus", f"--config.file={configuration}", f"--storage.tsdb.path={data}",
            f"--web.listen-address={address}", "--log.level=warn",
        ]  # fmt: skip
        self._http = httpx.Client(base_url=f"http://{address}", timeout=DEADLINE_SECONDS)

    def __enter__(self) -> Prometheus:
        self._process = subprocess.Popen(self._command)
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def over(self, expr: str, start: float, end: float) -> list[Series]:
        """Every series of the expression that has a value between two moments. Raises Refused."""
        asked = {"query": expr, "start": str(start), "end": str(end), "step": str(STEP_SECONDS)}
        return [_series(found) for found in self._get("query_range", asked)["result"]]

    def values_of(self, label: str, selector: str) -> list[str]:
        """What Grafana's label_values(selector, label) lists."""
        return list(self._get(f"label/{label}/values", {"match[]": selector}))

    def up(self) -> set[str]:
        """Instances whose last scrape was a success."""
        return {
            target["labels"]["instance"]
            for target in self._get("targets", {})["activeTargets"]
            if target["health"] == "up"
        }

    def _get(self, what: str, asked: Mapping[str, str]) -> Any:
        answer = self._http.get(f"/api/v1/{what}", params=asked).json()
        if answer["status"] != "success":
            raise Refused(answer["error"])
        return answer["data"]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while not self._ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("prometheus did not become ready")
            time.sleep(0.1)

    def _ready(self) -> bool:
        try:
            return self._http.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def _stop(self) -> None:
        self._http.close()
        self._process.terminate()
        self._process.wait()


def _series(found: Mapping[str, Any]) -> Series:
    points = ((float(at), float(value)) for at, value in found["values"])
    return Series(found["metric"], tuple(point for point in points if math.isfinite(point[1])))
