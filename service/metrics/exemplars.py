"""Traces as exemplars: which request a bucket may be looked into by."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client.samples import Exemplar

from service.engine.types import Histogram
from service.exemplars import Example


def of_buckets(examples: Iterable[Example], observed: Histogram) -> list[Exemplar | None]:
    """The newest example of each bucket of `observed`, which has to have counted somebody."""
    found: list[Exemplar | None] = [None] * len(observed.counts)
    for example in examples:  # the oldest first
        at = bisect_left(observed.bounds, example.seconds)
        if observed.counts[at]:
            found[at] = Exemplar({"trace_id": example.trace_id}, example.seconds, example.at)
    return found
