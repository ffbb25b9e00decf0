"""What /metrics says, read back by prometheus_client's own parsers. NVML is in tests/e2e/test_nvml.py."""

import threading

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

ENGINE = {
    "snugfit_requests_running": 0, "snugfit_requests_waiting": 0, "snugfit_requests_waiting_limit": 64,
    "snugfit_context_tokens": 64, "snugfit_kv_cache_capacity_tokens": 64, "snugfit_kv_cache_used_tokens": 16,
    "snugfit_kv_cache_usage_ratio": 0.25, "snugfit_prompt_tokens_total": 100,
    "snugfit_generation_tokens_total": 50, "snugfit_requests_rejected_total": 2,
    "snugfit_requests_timed_out_total": 5, "snugfit_kv_cache_capacity_blocks": 8,
    "snugfit_kv_cache_used_blocks": 3, "snugfit_preemptions_total": 4,
    "snugfit_prefix_cache_queried_tokens_total": 80, "snugfit_prefix_cache_hit_tokens_total": 60,
    "snugfit_engine_steps_total": 30, "snugfit_out_of_memory_retries_total": 1,
}  # fmt: skip


def samples(text):
    """(name, labels) to value."""
    families = parse(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def test_the_engines_numbers_are_read_with_the_served_name(live):
    live.post()
    found = samples(live.get("/metrics").text)
    model = (("model", "lab/tiny"),)
    assert {name: found[name, model] for name in ENGINE} == ENGINE
    assert found["snugfit_requests_total", (("finish_reason", "stop"), *model)] == 1
    assert found["snugfit_http_responses_total", (("status", "200"),)] == 1
    assert found["snugfit_ready", ()] == 1


def test_histograms_are_cumulative_and_end_in_infinity(live):
    found = samples(live.get("/metrics").text)
    name = "snugfit_time_to_first_token_seconds"
    counts = [found[f"{name}_bucket", (("le", le), ("model", "lab/tiny"))] for le in ("0.1", "1.0", "+Inf")]
    assert counts == [3, 5, 6]
    assert found[f"{name}_count", (("model", "lab/tiny"),)] == 6
    assert found[f"{name}_sum", (("model", "lab/tiny"),)] == 4.5


def test_steps_are_shown_by_their_time_and_by_the_requests_in_them(live):
    found = samples(live.get("/metrics").text)
    model = ("model", "lab/tiny")
    size, time = "snugfit_step_batch_size", "snugfit_step_time_seconds"
    assert [found[f"{size}_bucket", (("le", le), model)] for le in ("1.0", "4.0", "+Inf")] == [10, 25, 30]
    assert found[f"{size}_sum", (model,)] == 90
    assert [found[f"{time}_bucket", (("le", le), model)] for le in ("0.01", "+Inf")] == [20, 30]


def test_memory_is_shown_as_planned_measured_and_against_the_budget(live):
    found = samples(live.get("/metrics").text)
    cpu = (("device", "cpu"),)
    assert found["snugfit_memory_budget_bytes", cpu] == 1000
    assert found["snugfit_planned_bytes", cpu] == 760
    assert found["snugfit_measured_peak_bytes", cpu] == 700
    assert found["snugfit_process_startup_bytes", ()] == 300
    resident = psutil.Process().memory_info().rss
    assert found["snugfit_process_resident_bytes", ()] == pytest.approx(resident, rel=0.2)


def test_build_info_names_version_model_and_dtype(live):
    (labels,) = (
        dict(labels) for name, labels in samples(live.get("/metrics").text) if name == "snugfit_build_info"
    )
    assert (labels["model"], labels["dtype"]) == ("lab/tiny", "bfloat16")
    assert labels["version"]


def test_while_loading_there_are_no_engine_series_but_there_is_a_plan(running):
    ready = threading.Event()

    def never(progress):
        while True:
            ready.wait(0.01)
            progress(0, 0)

    with running(start=never, wait=False) as live:
        found = samples(live.get("/metrics").text)
        assert found["snugfit_ready", ()] == 0
        assert found["snugfit_planned_bytes", (("device", "cpu"),)] == 760
        assert not any(name in ENGINE for name, _ in found)


def test_openmetrics_is_given_to_who_accepts_it(live):
    response = live.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert response.headers["content-type"].startswith("application/openmetrics-text")
    assert {family.name for family in parse_openmetrics(response.text)} >= {
        "snugfit_requests",
        "snugfit_ready",
    }
    assert live.get("/metrics").headers["content-type"].startswith("text/plain")


def test_every_metric_has_a_help_text_and_our_prefix(live):
    for family in parse(live.get("/metrics").text):
        assert family.name.startswith("snugfit_")
        assert family.documentation.endswith(".") or "value is 1" in family.documentation


def test_a_scrape_does_not_count_as_a_request(live):
    live.get("/metrics")
    assert sum(live.service.responses.values()) == 0
