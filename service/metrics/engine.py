"""The engine's statistics as metrics: under our names, and under vLLM's for those who know only these.

The `model` label is the served name, never what a client sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import Metric

from loader.kv_layout import KvLayout
from service.engine.types import EngineStats, Histogram
from service.exemplars import Exemplars
from service.metrics.exemplars import of_buckets
from service.metrics.families import Labels, counter, counters, gauge, histogram

Table = Mapping[str, tuple[str, str]]  # name -> help text, attribute of EngineStats


@dataclass(frozen=True)
class Names:
    """What one set of metrics is called."""

    labels: Labels  # that every series has, beside the model's
    model_label: str
    gauges: Table
    counters: Table
    histograms: Table
    usage: str
    finished: tuple[str, str]  # the counter, and its label
    cache: str
    reasons: Mapping[str, str] = field(default_factory=dict)  # of the end of a request, that have other names


# fmt: off
OURS = Names(
    labels={},
    model_label="model",
    gauges={
        "snugfit_requests_running": ("Requests that the engine is stepping.", "running"),
        "snugfit_requests_waiting": ("Requests that wait for the engine.", "waiting"),
        "snugfit_requests_waiting_limit": (
            "How many may wait; one more is answered with 429.", "waiting_limit",
        ),
        "snugfit_context_tokens": ("Tokens one conversation may hold.", "context"),
        "snugfit_kv_cache_capacity_tokens": ("Tokens the KV cache has room for.", "kv_tokens_total"),
        "snugfit_kv_cache_used_tokens": ("Tokens that the KV blocks in use have room for.", "kv_tokens_used"),
        "snugfit_kv_cache_capacity_blocks": ("Blocks that the KV cache consists of.", "kv_blocks_total"),
        "snugfit_kv_cache_used_blocks": (
            "Blocks that requests hold. Those that are only kept to be found again are free.",
            "kv_blocks_used",
        ),
    },
    counters={
        "snugfit_prompt_tokens": ("Prompt tokens processed.", "prompt_tokens"),
        "snugfit_generation_tokens": ("Tokens generated.", "generation_tokens"),
        "snugfit_requests_rejected": ("Requests that found the queue full.", "rejected"),
        "snugfit_requests_timed_out": ("Requests that waited longer than one may.", "timed_out"),
        "snugfit_preemptions": (
            "Times that a request gave its KV blocks to older ones and was computed again later.",
            "preemptions",
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
    },
    histograms={
        "snugfit_time_to_first_token_seconds": ("From arrival to the first token.", "time_to_first_token"),
        "snugfit_inter_token_latency_seconds": ("Between two tokens of one answer.", "inter_token_latency"),
        "snugfit_e2e_request_latency_seconds": ("From arrival to the last token.", "e2e_latency"),
        "snugfit_request_queue_time_seconds": ("From arrival to the first step.", "queue_time"),
        "snugfit_step_time_seconds": ("One step of the engine, the host's work included.", "step_time"),
        "snugfit_step_batch_size": ("Requests in one step.", "batch_size"),
    },
    usage="snugfit_kv_cache_usage_ratio",
    finished=("snugfit_requests", "finish_reason"),
    cache="snugfit_kv_cache_info",
)
VLLM = Names(
    labels={"engine": "0"},
    model_label="model_name",
    gauges={
        "vllm:num_requests_running": ("Requests that the engine is stepping.", "running"),
        "vllm:num_requests_waiting": ("Requests that wait for the engine.", "waiting"),
    },
    counters={
        "vllm:prompt_tokens": ("Prompt tokens processed.", "prompt_tokens"),
        "vllm:generation_tokens": ("Tokens generated.", "generation_tokens"),
        "vllm:num_preemptions": ("Times that a request gave its KV blocks to older ones.", "preemptions"),
        "vllm:prefix_cache_queries": ("Prompt tokens that were looked up in the KV cache.", "prefix_queries"),
        "vllm:prefix_cache_hits": ("Prompt tokens that were in the KV cache.", "prefix_hits"),
    },
    histograms={
        "vllm:time_to_first_token_seconds": ("From arrival to the first token.", "time_to_first_token"),
        "vllm:inter_token_latency_seconds": ("Between two tokens of one answer.", "inter_token_latency"),
        "vllm:e2e_request_latency_seconds": ("From arrival to the last token.", "e2e_latency"),
        "vllm:request_queue_time_seconds": ("From arrival to the first step.", "queue_time"),
    },
    usage="vllm:kv_cache_usage_perc",
    finished=("vllm:request_success", "finished_reason"),
    cache="vllm:cache_config_info",
    reasons={"cancelled": "abort"},
)
# fmt: on


def families(
    stats: EngineStats, model: str, names: Names, exemplars: Exemplars | None = None
) -> Iterator[Metric]:
    labels = {names.model_label: model, **names.labels}
    for name, (words, attribute) in names.gauges.items():
        yield gauge(name, words, getattr(stats, attribute), labels)
    for name, (words, attribute) in names.counters.items():
        yield counter(name, words, getattr(stats, attribute), labels)
    used = stats.kv_tokens_used / stats.kv_tokens_total if stats.kv_tokens_total else 0.0
    yield gauge(names.usage, "Share of the KV cache in use, 0 to 1.", used, labels)
    finished, label = names.finished
    reasons: Counter[str] = Counter()
    for reason, count in stats.finished.items():
        reasons[names.reasons.get(reason, reason)] += count
    yield counters(finished, "Requests that ended in the engine, by reason.", label, reasons, labels)
    for name, (words, attribute) in names.histograms.items():
        observed: Histogram | None = getattr(stats, attribute)
        if observed:
            examples = of_buckets(exemplars.newest(attribute), observed) if exemplars else ()
            yield histogram(name, words, observed, labels, examples)


def cache(layout: KvLayout, model: str, names: Names) -> Metric:
    """The pool's measures as labels, as the Gateway API's endpoint picker reads them for its prefix scorer.

    `num_gpu_blocks` is its word for them, on the CPU too.
    """
    labels = {
        names.model_label: model,
        **names.labels,
        "block_size": str(layout.block_tokens),
        "num_gpu_blocks": str(layout.groups[0].blocks),
    }
    return gauge(
        names.cache, "Tokens of a KV block, and how many blocks there are; the value is 1.", 1, labels
    )
