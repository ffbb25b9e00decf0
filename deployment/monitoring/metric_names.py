"""Names of metrics: those that the service exposes, and those that an expression asks for."""

from __future__ import annotations

import re
import time

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from deployment.monitoring.scripted import application

SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}
# With a colon on either side it is the name of a recording rule.
_NAME = re.compile(r"(?<![:\w])snugfit_\w+(?![\w:])")
DEADLINE_SECONDS = 30


def exposed() -> set[str]:
    """The names of all samples that a loaded service may have, read from one."""
    app, _ = application("7GB", gpu="16GiB")
    with TestClient(app) as client:
        client.post("/script/load")
        deadline = time.monotonic() + DEADLINE_SECONDS
        while client.get("/ready").status_code != 200:
            if time.monotonic() > deadline:
                raise TimeoutError("the scripted service did not become ready")
            time.sleep(0.01)
        families = text_string_to_metric_families(client.get("/metrics").text)
        return {family.name + end for family in families for end in SUFFIXES.get(family.type, ("",))}


def asked_for(expr: str) -> set[str]:
    """The service's metrics in a PromQL expression, those of recording rules left out."""
    return set(_NAME.findall(expr))
