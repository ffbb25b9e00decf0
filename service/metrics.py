"""/metrics: a collector that reads the engine's statistics, NVML and the plan when asked, and keeps nothing.

The only file that imports prometheus_client. The `model` label is the served name, never what a client sent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.backend import ModelMemory
from service.engine.types import EngineStats, Histogram
from service.lifecycle import Service
from service.nvml import DeviceMemory, Nvml

Family = type[GaugeMetricFamily] | type[CounterMetricFamily]

# fmt: off
GAUGES = {
    "snugfit_requests_running": ("Requests that the engine is stepping.", "running"),
    "snugfit_requests_waiting": ("Requests that wait for the engine.", "waiting"),
    "snugfit_requests_waiting_limit": ("How many may wait; one more is answered with 429.", "waiting_limit"),
    "snugfit_context_tokens": ("Tokens one conversation may hold.", "context"),
    "snugfit_kv_cache_capacity_tokens": ("Tokens the KV cache has room for.", "kv_tokens_total"),
    "snugfit_kv_cache_used_tokens": ("Tokens that the KV blocks in use have room for.", "kv_tokens_used"),
    "snugfit_kv_cache_capacity_blocks": ("Blocks that the KV cache consists of.", "kv_blocks_total"),
    "snugfit_kv_cache_used_blocks": (
        "Blocks that requests hold. Those that are only kept to be found again are free.", "kv_blocks_used",
    ),
}
COUNTERS = {
    "snugfit_prompt_tokens": ("Prompt tokens processed.", "prompt_tokens"),
    "snugfit_generation_tokens": ("Tokens generated.", "generation_tokens"),
    "snugfit_requests_rejected": ("Requests that found the queue full.", "rejected"),
    "snugfit_requests_timed_out": ("Requests that waited longer than one may.", "timed_out"),
    "snugfit_preemptions": (
        "Times that a request gave its KV blocks to older ones and was computed again later.", "preemptions",
    ),
    "snugfit_prefix_cache_queried_tokens": (
        "Prompt tokens that were looked up in the KV cache.", "prefix_queries",
    ),
    "snugfit_prefix_cache_hit_tokens": (
        "Prompt tokens that were in the KV cache and not computed again.", "prefix_hits",
    ),
    "snugfit_engine_steps": ("Forwards of the model.", "steps"),
    "snugfit_out_of_memory_retries": (
        "Steps that ran out of device memory and were tried again, mostly with less.", "out_of_memory",
    ),
}
HISTOGRAMS = {
    "snugfit_time_to_first_token_seconds": ("From arrival to the first token.", "time_to_first_token"),
    "snugfit_inter_token_latency_seconds": ("Between two tokens of one answer.", "inter_token_latency"),
    "snugfit_e2e_request_latency_seconds": ("From arrival to the last token.", "e2e_latency"),
    "snugfit_request_queue_time_seconds": ("From arrival to the first step.", "queue_time"),
    "snugfit_step_time_seconds": ("One step of the engine, the host's work included.", "step_time"),
    "snugfit_step_batch_size": ("Requests in one step.", "batch_size"),
}
# fmt: on
PROCESS_HELP = (
    "Device memory of this process, as the driver tells it. Missing where it does not: in a container its "
    "process ids are the host's, and on Windows the figure is not kept."
)


class Metrics:
    """The exporter of one service. `expose` may be called from any thread."""

    def __init__(self, service: Service, version: str) -> None:
        self._nvml = Nvml()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_ServiceCollector(service, version, self._nvml))

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their content type: Prometheus' text, or OpenMetrics for who accepts it."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def close(self) -> None:
        self._nvml.close()


class _ServiceCollector(Collector):
    def __init__(self, service: Service, version: str, nvml: Nvml) -> None:
        self._service, self._version, self._nvml = service, version, nvml
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        loaded = self._service.loaded
        yield from self._about()
        yield from self._planned()
        yield from _vram(self._nvml.read())
        yield _gauge("snugfit_nvml_up", "1 while the NVIDIA driver's library answers.", self._nvml.up)
        yield _gauge(
            "snugfit_process_resident_bytes",
            "Resident memory of the process, pages of mapped files included.",
            self._process.memory_info().rss,
        )
        if loaded:
            yield from _engine(loaded.engine.stats(), self._service.name)
        if loaded and loaded.memory:
            yield from _measured(loaded.memory)

    def _about(self) -> Iterator[Metric]:
        plan, name = self._service.plan, self._service.name
        labels = {"version": self._version, "model": name, "dtype": plan.dtype if plan else ""}
        info = GaugeMetricFamily("snugfit_build_info", "What runs here; the value is 1.", labels=list(labels))
        info.add_metric(list(labels.values()), 1)
        yield info
        yield _gauge("snugfit_ready", "1 while requests are answered, as /ready says.", self._service.ready)
        responses = CounterMetricFamily(
            "snugfit_http_responses", "Responses by HTTP status, probes not counted.", labels=["status"]
        )
        for status, count in sorted(self._service.responses.items()):
            responses.add_metric([str(status)], count)
        yield responses

    def _planned(self) -> Iterator[Metric]:
        devices = self._service.plan.devices if self._service.plan else ()
        budgets = {device.device: device.budget_bytes for device in devices}
        vram = {name: value for name, value in budgets.items() if name.startswith("cuda")}
        host = {name: value for name, value in budgets.items() if name not in vram}
        yield _by_device("snugfit_vram_budget_bytes", "What snugfit may use of a GPU's memory.", vram)
        yield _by_device("snugfit_memory_budget_bytes", "What snugfit may use of RAM or disk.", host)
        peaks = {device.device: device.peak_bytes for device in devices}
        yield _by_device("snugfit_planned_bytes", "Peak that the plan predicts.", peaks)


def _measured(memory: ModelMemory) -> Iterator[Metric]:
    yield _by_device(
        "snugfit_measured_peak_bytes",
        "The most that the model has taken so far, loading and the worst-case forward included.",
        memory.measured_peak_bytes(),
    )
    yield _gauge(
        "snugfit_process_startup_bytes",
        "Resident memory before the model was loaded; what is above it counts against the CPU's budget.",
        memory.baseline_bytes,
    )


def _engine(stats: EngineStats, model: str) -> Iterator[Metric]:
    for name, (words, attribute) in GAUGES.items():
        yield _labelled(GaugeMetricFamily, name, words, model, getattr(stats, attribute))
    for name, (words, attribute) in COUNTERS.items():
        yield _labelled(CounterMetricFamily, name, words, model, getattr(stats, attribute))
    used = stats.kv_tokens_used / stats.kv_tokens_total if stats.kv_tokens_total else 0.0
    yield _labelled(
        GaugeMetricFamily, "snugfit_kv_cache_usage_ratio", "Share of the KV cache in use.", model, used
    )
    requests = CounterMetricFamily(
        "snugfit_requests", "Requests that ended in the engine, by reason.", labels=["model", "finish_reason"]
    )
    for reason, count in sorted(stats.finished.items()):
        requests.add_metric([model, reason], count)
    yield requests
    for name, (words, attribute) in HISTOGRAMS.items():
        observed: Histogram | None = getattr(stats, attribute)
        if observed:
            yield _histogram(name, words, model, observed)


def _histogram(name: str, words: str, model: str, observed: Histogram) -> HistogramMetricFamily:
    bounds = [*map(floatToGoString, observed.bounds), "+Inf"]
    buckets = [
        (bound, float(count)) for bound, count in zip(bounds, accumulate(observed.counts), strict=True)
    ]
    family = HistogramMetricFamily(name, words, labels=["model"])
    family.add_metric([model], buckets, observed.total)
    return family


def _vram(devices: Iterable[DeviceMemory]) -> Iterator[Metric]:
    labels = ["device", "uuid"]
    used = GaugeMetricFamily("snugfit_vram_used_bytes", "Memory in use on the GPU, by anyone.", labels=labels)
    total = GaugeMetricFamily("snugfit_vram_total_bytes", "Memory of the GPU.", labels=labels)
    own = GaugeMetricFamily("snugfit_vram_process_bytes", PROCESS_HELP, labels=labels)
    for device in devices:
        values = [device.device, device.uuid]
        used.add_metric(values, device.used_bytes)
        total.add_metric(values, device.total_bytes)
        if device.process_bytes is not None:
            own.add_metric(values, device.process_bytes)
    yield from (used, total, own)


def _gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, words, value=float(value))


def _labelled(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    words: str,
    model: str,
    value: float,
) -> Metric:
    metric = family(name, words, labels=["model"])
    metric.add_metric([model], value)
    return metric


def _by_device(name: str, words: str, values: Mapping[str, int]) -> GaugeMetricFamily:
    metric = GaugeMetricFamily(name, words, labels=["device"])
    for device, value in values.items():
        metric.add_metric([device], value)
    return metric
