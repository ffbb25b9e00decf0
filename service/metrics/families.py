"""Small metric families, built in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.samples import Exemplar
from prometheus_client.utils import floatToGoString

from service.engine.types import Histogram

Labels = Mapping[str, str]


def gauge(name: str, words: str, value: float, labels: Labels | None = None) -> GaugeMetricFamily:
    labels = labels or {}
    family = GaugeMetricFamily(name, words, labels=list(labels))
    family.add_metric(list(labels.values()), float(value))
    return family


def counter(name: str, words: str, value: float, labels: Labels) -> CounterMetricFamily:
    family = CounterMetricFamily(name, words, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family


def gauges(name: str, words: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    """A series for each value of one label."""
    family = GaugeMetricFamily(name, words, labels=[label])
    for value_of_label, value in values.items():
        family.add_metric([value_of_label], value)
    return family


def counters(
    name: str, words: str, label: str, values: Mapping[str, int], labels: Labels | None = None
) -> CounterMetricFamily:
    """A series for each value of one label, all with `labels`."""
    labels = labels or {}
    family = CounterMetricFamily(name, words, labels=[*labels, label])
    for value_of_label, value in sorted(values.items()):
        family.add_metric([*labels.values(), value_of_label], value)
    return family


def histogram(
    name: str, words: str, observed: Histogram, labels: Labels, exemplars: Sequence[Exemplar | None] = ()
) -> HistogramMetricFamily:
    """`exemplars` are those of the buckets, in their order, or none at all."""
    bounds = [*map(floatToGoString, observed.bounds), "+Inf"]
    examples = exemplars or [None] * len(bounds)
    buckets = [
        (bound, float(count), example) if example else (bound, float(count))
        for bound, count, example in zip(bounds, accumulate(observed.counts), examples, strict=True)
    ]
    family = HistogramMetricFamily(name, words, labels=list(labels))
    family.add_metric(list(labels.values()), buckets, observed.total)
    return family
