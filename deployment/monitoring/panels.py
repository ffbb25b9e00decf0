"""What the dashboard shows: rows of panels and their queries. `dashboard.py` writes the file."""

from __future__ import annotations

from dataclasses import dataclass

# Series of the engine have the model's name; those of the process and its devices do not.
# The namespace is there in a cluster only; "all" of them takes series without one, too.
TARGET = 'namespace=~"$namespace", job=~"$job", instance=~"$instance"'
ENGINE = f'{TARGET}, model=~"$model"'
WINDOW = "$__rate_interval"


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression; `legend` is Grafana's template for the name of each series."""

    expr: str
    legend: str


@dataclass(frozen=True, slots=True)
class Panel:
    """`unit` is one of Grafana's ids; `width` is in columns."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    width: int = 8
    kind: str = "timeseries"  # or "stat", "bargauge"
    about: str = ""
    decimals: int | None = None
    top: float | None = None  # of the axis, where a share has one


@dataclass(frozen=True, slots=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def _rate(counter: str, labels: str = ENGINE) -> str:
    return f"rate({counter}{{{labels}}}[{WINDOW}])"


def _quantile(share: float, histogram: str) -> str:
    return f"histogram_quantile({share}, sum by (le) ({_rate(f'{histogram}_bucket')}))"


def _quantiles(histogram: str) -> tuple[Query, ...]:
    shares = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"))
    return tuple(Query(_quantile(share, histogram), name) for share, name in shares)


def _gauge(name: str, labels: str = TARGET) -> str:
    return f"{name}{{{labels}}}"


def _of_gpus(name: str) -> str:
    return _gauge(name, f'{TARGET}, device=~"cuda:.+"')


def _of_the_host(name: str) -> str:
    return _gauge(name, f'{TARGET}, device="cpu"')


RESPONSES = _rate("snugfit_http_responses_total", TARGET)
SERVER_ERRORS = _rate("snugfit_http_responses_total", f'{TARGET}, status=~"5.."')
ERROR_SHARE = f"sum({SERVER_ERRORS}) / (sum({RESPONSES}) > 0)"

GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Replicas ready", "short",
            (
                Query(f"sum({_gauge('snugfit_ready')})", "ready"),
                Query(f"count({_gauge('snugfit_ready')})", "there"),
            ),
            4, "stat",
        ),
        Panel("Responses", "reqps", (Query(f"sum({RESPONSES})", "responses"),), 4, "stat"),
        Panel("Share of 5xx", "percentunit", (Query(ERROR_SHARE, "5xx"),), 4, "stat", decimals=1),
        Panel(
            "First token, p90", "s",
            (Query(_quantile(0.9, "snugfit_time_to_first_token_seconds"), "p90"),), 4, "stat",
        ),
        Panel(
            "Tokens written", "short",
            (Query(f"sum({_rate('snugfit_generation_tokens_total')})", "tokens/s"),), 4, "stat",
            "Tokens per second over all replicas.", 0,
        ),
        Panel(
            "Waiting", "short",
            (Query(f"sum({_gauge('snugfit_requests_waiting', ENGINE)})", "requests"),), 4, "stat",
        ),
    ),
)  # fmt: skip

REQUESTS = Row(
    "Requests",
    (
        Panel(
            "Responses by status", "reqps", (Query(f"sum by (status) ({RESPONSES})", "{{status}}"),), 6,
            about="Probes are not counted. 499: the client left. A stream that breaks has sent its 200.",
        ),
        Panel(
            "Requests ended, by reason", "reqps",
            (Query(f"sum by (finish_reason) ({_rate('snugfit_requests_total')})", "{{finish_reason}}"),), 6,
            about="As the engine ends them: cancelled is a client that left, error a step that failed.",
        ),
        Panel(
            "Running and waiting", "short",
            (
                Query(f"sum({_gauge('snugfit_requests_running', ENGINE)})", "running"),
                Query(f"sum({_gauge('snugfit_requests_waiting', ENGINE)})", "waiting"),
                Query(f"sum({_gauge('snugfit_requests_waiting_limit', ENGINE)})", "may wait"),
            ),
            6, about="Over all replicas. One more than may wait is answered with 429.",
        ),
        Panel(
            "Refused", "reqps",
            (
                Query(f"sum({_rate('snugfit_requests_rejected_total')})", "queue full (429)"),
                Query(f"sum({_rate('snugfit_requests_timed_out_total')})", "waited too long (503)"),
            ),
            6,
        ),
    ),
)  # fmt: skip

LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time to first token", "s", _quantiles("snugfit_time_to_first_token_seconds"), 6,
            about="From arrival: the time in the queue is part of it.",
        ),
        Panel(
            "Between two tokens", "s", _quantiles("snugfit_inter_token_latency_seconds"), 6,
            about="A preempted request shows here as one long gap.",
        ),
        Panel("Time in the queue", "s", _quantiles("snugfit_request_queue_time_seconds"), 6),
        Panel(
            "Whole answers", "s", _quantiles("snugfit_e2e_request_latency_seconds"), 6,
            about="From arrival to the last token, of answers that were given whole.",
        ),
    ),
)  # fmt: skip

STEPS = Row(
    "Tokens and steps",
    (
        Panel(
            "Tokens per second", "short",
            (
                Query(f"sum({_rate('snugfit_prompt_tokens_total')})", "read"),
                Query(f"sum({_rate('snugfit_generation_tokens_total')})", "written"),
            ),
            about="Read: prompts, with what the KV cache had of them.",
        ),
        Panel(
            "Requests in one step", "short",
            (
                Query(
                    f"sum({_rate('snugfit_step_batch_size_sum')})"
                    f" / (sum({_rate('snugfit_step_batch_size_count')}) > 0)",
                    "mean",
                ),
                Query(_quantile(0.9, "snugfit_step_batch_size"), "p90"),
            ),
            decimals=1,
        ),
        Panel("Time of one step", "s", _quantiles("snugfit_step_time_seconds")),
    ),
)  # fmt: skip

KV = Row(
    "KV cache",
    (
        Panel(
            "In use", "percentunit",
            (Query(_gauge("snugfit_kv_cache_usage_ratio", ENGINE), "{{instance}} {{model}}"),),
            about="Blocks that requests hold; those only kept to be found again count as free.", top=1,
        ),
        Panel(
            "Prompts found in the cache", "percentunit",
            (
                Query(
                    f"sum({_rate('snugfit_prefix_cache_hit_tokens_total')})"
                    f" / (sum({_rate('snugfit_prefix_cache_queried_tokens_total')}) > 0)",
                    "of prompt tokens",
                ),
            ),
            top=1,
        ),
        Panel(
            "Preemptions", "ops",
            (Query(f"sum by (instance) ({_rate('snugfit_preemptions_total')})", "{{instance}}"),),
            about="Times a second that a request gave its blocks to older ones and was computed again.",
        ),
    ),
)  # fmt: skip

HERE = "{{instance}} {{device}}"
MEMORY = Row(
    "Memory",
    (
        Panel(
            "VRAM", "bytes",
            (
                Query(_of_gpus("snugfit_vram_used_bytes"), f"used by anyone, {HERE}"),
                Query(_of_gpus("snugfit_vram_process_bytes"), f"this process, {HERE}"),
                Query(_of_gpus("snugfit_measured_peak_bytes"), f"measured peak, {HERE}"),
                Query(_of_gpus("snugfit_planned_bytes"), f"planned, {HERE}"),
                Query(_of_gpus("snugfit_vram_budget_bytes"), f"budget, {HERE}"),
                Query(_of_gpus("snugfit_vram_total_bytes"), f"total, {HERE}"),
            ),
            12, about="In a container the driver often does not tell what this process uses.",
        ),
        Panel(
            "Host memory above the start", "bytes",
            (
                Query(
                    f"{_gauge('snugfit_process_resident_bytes')} - {_gauge('snugfit_process_startup_bytes')}",
                    "resident, {{instance}}",
                ),
                Query(_of_the_host("snugfit_measured_peak_bytes"), "measured peak, {{instance}}"),
                Query(_of_the_host("snugfit_planned_bytes"), "planned, {{instance}}"),
                Query(_of_the_host("snugfit_memory_budget_bytes"), "budget, {{instance}}"),
            ),
            12, about="Beside a GPU also what CUDA's libraries take on the host, which no budget counts.",
        ),
        Panel(
            "Driver answers (NVML)", "short", (Query(_gauge("snugfit_nvml_up"), "{{instance}}"),), 12, top=1,
            about="0 on a machine without an NVIDIA driver, too.",
        ),
        Panel(
            "Steps that ran out of device memory", "ops",
            (Query(f"sum by (instance) ({_rate('snugfit_out_of_memory_retries_total')})", "{{instance}}"),),
            12, about="They are tried again, mostly with less.",
        ),
    ),
)  # fmt: skip

START = Row(
    "Start",
    (
        Panel(
            "Ready and draining", "short",
            (
                Query(_gauge("snugfit_ready"), "{{instance}} ready"),
                Query(_gauge("snugfit_draining"), "{{instance}} draining"),
            ),
            12, top=1,
        ),
        Panel(
            "Parts of the start", "s",
            (Query(f"max by (phase) ({_gauge('snugfit_start_seconds')})", "{{phase}}"),), 12, "bargauge",
            "Those that are over, of the replica that took longest.",
        ),
    ),
)  # fmt: skip

ROWS = (GLANCE, REQUESTS, LATENCY, STEPS, KV, MEMORY, START)
