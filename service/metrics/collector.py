"""A collector that reads the engine's statistics, NVML and the plan when asked, and keeps nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from loader.batching import CONTINUOUS
from service.backend import ModelMemory
from service.exemplars import Exemplars
from service.lifecycle import Service
from service.metrics import engine
from service.metrics.families import counters, gauge, gauges
from service.nvml import DeviceMemory, Nvml

PROCESS_HELP = (
    "Device memory of this process, as the driver tells it. Missing where it does not: in a container its "
    "process ids are the host's, and on Windows the figure is not kept."
)


class Metrics:
    """The exporter of one service. `expose` may be called from any thread."""

    def __init__(
        self, service: Service, version: str, vllm_too: bool = False, exemplars: Exemplars | None = None
    ) -> None:
        names = (engine.OURS, engine.VLLM) if vllm_too else (engine.OURS,)
        self._nvml = Nvml()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_AboutService(service, version))
        self._registry.register(_AboutMemory(service, self._nvml))
        for each in names:
            self._registry.register(_AboutEngine(service, each, exemplars))

    def expose(self, accept: str) -> tuple[bytes, str]:
        """The metrics and their content type: Prometheus' text, or OpenMetrics for who accepts it."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def close(self) -> None:
        self._nvml.close()


class _AboutService(Collector):
    def __init__(self, service: Service, version: str) -> None:
        self._service, self._version = service, version

    def collect(self) -> Iterator[Metric]:
        plan, service = self._service.plan, self._service
        labels = {"version": self._version, "model": service.name, "dtype": plan.dtype if plan else ""}
        yield gauge("snugfit_build_info", "What runs here; the value is 1.", 1, labels)
        yield gauge("snugfit_ready", "1 while requests are answered, as /ready says.", service.ready)
        yield gauge(
            "snugfit_draining", "1 while the service finishes what runs and then ends.", service.draining
        )
        counted = dict(service.responses)  # in one step: the event loop counts meanwhile
        responses = {str(status): count for status, count in counted.items()}
        words = "Responses by HTTP status, probes not counted."
        yield counters("snugfit_http_responses", words, "status", responses)
        words = "What each part of the start took; those that are over."
        yield gauges("snugfit_start_seconds", words, "phase", service.progress.took)


class _AboutMemory(Collector):
    def __init__(self, service: Service, nvml: Nvml) -> None:
        self._service, self._nvml = service, nvml
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        yield from self._planned()
        yield from _vram(self._nvml.read())
        yield gauge("snugfit_nvml_up", "1 while the NVIDIA driver's library answers.", self._nvml.up)
        yield gauge(
            "snugfit_process_resident_bytes",
            "Resident memory of the process, pages of mapped files included.",
            self._process.memory_info().rss,
        )
        loaded = self._service.loaded
        if loaded and loaded.memory:
            yield from _measured(loaded.memory)

    def _planned(self) -> Iterator[Metric]:
        devices = self._service.plan.devices if self._service.plan else ()
        budgets = {device.device: device.budget_bytes for device in devices}
        vram = {name: value for name, value in budgets.items() if name.startswith("cuda")}
        host = {name: value for name, value in budgets.items() if name not in vram}
        yield gauges("snugfit_vram_budget_bytes", "What snugfit may use of a GPU's memory.", "device", vram)
        yield gauges("snugfit_memory_budget_bytes", "What snugfit may use of RAM or disk.", "device", host)
        peaks = {device.device: device.peak_bytes for device in devices}
        yield gauges("snugfit_planned_bytes", "Peak that the plan predicts.", "device", peaks)


class _AboutEngine(Collector):
    def __init__(self, service: Service, names: engine.Names, exemplars: Exemplars | None) -> None:
        self._service, self._names, self._exemplars = service, names, exemplars

    def collect(self) -> Iterator[Metric]:
        loaded, plan, model = self._service.loaded, self._service.plan, self._service.name
        if loaded:
            yield from engine.families(loaded.engine.stats(), model, self._names, self._exemplars)
        if loaded and plan and plan.batching == CONTINUOUS:
            yield engine.cache(plan.kv, model, self._names)


def _measured(memory: ModelMemory) -> Iterator[Metric]:
    yield gauges(
        "snugfit_measured_peak_bytes",
        "The most that the model has taken so far, loading and the worst-case forward included.",
        "device",
        memory.measured_peak_bytes(),
    )
    yield gauge(
        "snugfit_process_startup_bytes",
        "Resident memory before the model was loaded; what is above it counts against the CPU's budget.",
        memory.baseline_bytes,
    )


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
