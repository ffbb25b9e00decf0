"""What /metrics says, read back by prometheus_client's own parsers. NVML is in tests/e2e/test_nvml.py."""

import shutil
import subprocess
import threading
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace

import psutil
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from service.backend import Backend
from service.engine.types import Histogram
from service.exemplars import Exemplars
from service.lifecycle import Service
from service.metrics import engine as engine_metrics
from service.metrics.collector import Metrics
from service.metrics.exemplars import of_buckets
from service.prompt.defaults import GenerationDefaults

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


def test_the_responses_that_alerts_ask_for_are_there_before_the_first(live):
    """rate() of a series that begins at 1 is 0."""
    found = samples(live.get("/metrics").text)
    responses = {labels: value for (name, labels), value in found.items() if "http_responses" in name}
    assert responses == {(("status", status),): 0 for status in ("200", "500", "503")}


def test_responses_may_be_counted_while_they_are_read():
    """The scrape is on a thread, the counter on the event loop: here one is counted within the scrape."""

    class Status(int):
        def __str__(self):
            service.responses[404] += 1
            return super().__str__()

    service = Service("m", None)
    service.responses = Counter({Status(200): 1, Status(500): 1})
    assert b'snugfit_http_responses_total{status="200"} 1.0' in Metrics(service, "1").expose("")[0]


def test_reasons_that_become_one_under_another_name_are_counted_together(scripted):
    stats = replace(scripted().stats(), finished={"cancelled": 2, "abort": 1, "stop": 4})
    families = {family.name: family for family in engine_metrics.families(stats, "m", engine_metrics.VLLM)}
    found = families["vllm:request_success"].samples
    assert {sample.labels["finished_reason"]: sample.value for sample in found} == {"abort": 3, "stop": 4}


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


MODEL = ("model", "lab/tiny")
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}


def test_the_endpoint_picker_finds_the_queue_the_kv_cache_and_its_blocks(live):
    """Proposal 003 of the Gateway API Inference Extension: types and meanings are fixed, names are not."""
    families = {family.name: family for family in parse(live.get("/metrics").text)}
    for name in ("snugfit_requests_waiting", "snugfit_requests_running", "snugfit_kv_cache_usage_ratio"):
        (sample,) = families[name].samples  # it reads one series, whichever comes first
        assert families[name].type == "gauge"
        assert sample.value >= 0
    (info,) = families["snugfit_kv_cache_info"].samples
    assert info.labels == {"model": "lab/tiny", "block_size": "20", "num_gpu_blocks": "5"}
    assert info.value == 1


def test_a_model_that_is_not_batched_has_no_blocks_to_tell_of(running, plan):
    with running(plan=replace(plan, batching="one at a time")) as live:
        assert "snugfit_kv_cache_info" not in live.get("/metrics").text


def test_vllms_names_are_there_for_who_asks_for_them_and_agree_with_ours(running, live):
    assert "vllm:" not in live.get("/metrics").text
    with running(vllm_metrics="on") as other:
        other.post()
        found = samples(other.get("/metrics").text)
    ours, theirs = (MODEL,), (("engine", "0"), ("model_name", "lab/tiny"))
    for our, their in {
        "snugfit_requests_running": "vllm:num_requests_running",
        "snugfit_requests_waiting": "vllm:num_requests_waiting",
        "snugfit_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
        "snugfit_prompt_tokens_total": "vllm:prompt_tokens_total",
        "snugfit_generation_tokens_total": "vllm:generation_tokens_total",
        "snugfit_preemptions_total": "vllm:num_preemptions_total",
        "snugfit_prefix_cache_hit_tokens_total": "vllm:prefix_cache_hits_total",
        "snugfit_time_to_first_token_seconds_count": "vllm:time_to_first_token_seconds_count",
    }.items():
        assert found[our, ours] == found[their, theirs]
    assert found["vllm:request_success_total", (*theirs[:1], ("finished_reason", "stop"), *theirs[1:])] == 1
    assert found["vllm:request_success_total", (*theirs[:1], ("finished_reason", "abort"), *theirs[1:])] == 0
    blocks = (("block_size", "20"), *theirs, ("num_gpu_blocks", "5"))
    assert found["vllm:cache_config_info", tuple(sorted(blocks))] == 1


def test_a_bucket_names_the_newest_trace_that_fell_into_it(scripted):
    service = Service("m", None)
    service.loaded = Backend(scripted(), None, 64, GenerationDefaults(), 0, "float32", opened=ExitStack())
    exemplars = Exemplars()
    for seconds, trace in ((0.05, "a"), (0.5, "b"), (0.7, "c"), (7.0, "d")):
        exemplars.note("time_to_first_token", seconds, trace)
    text = Metrics(service, "1", exemplars=exemplars).expose(OPENMETRICS["accept"])[0].decode()
    found = {
        sample.labels["le"]: sample.exemplar
        for family in parse_openmetrics(text)
        for sample in family.samples
        if sample.name == "snugfit_time_to_first_token_seconds_bucket"
    }
    assert {bound: example.labels["trace_id"] for bound, example in found.items()} == {
        "0.1": "a", "1.0": "c", "+Inf": "d",
    }  # fmt: skip
    assert found["1.0"].value == 0.7


def test_a_bucket_that_counted_nobody_has_no_trace():
    exemplars = Exemplars()
    exemplars.note("time_to_first_token", 0.05, "a")
    assert of_buckets(exemplars.newest("time_to_first_token"), Histogram((0.1,), (0, 3), 9.0)) == [None, None]


def test_there_are_no_exemplars_unless_they_are_asked_for(live):
    live.post()
    assert "trace_id" not in live.get("/metrics", headers=OPENMETRICS).text


def test_each_phase_of_the_start_is_told_when_it_is_over(running, until):
    entered, go_on = threading.Event(), threading.Event()

    def start(progress):
        progress.enter("reading weights")
        entered.wait(10)
        progress.enter("starting the engine")
        while not go_on.wait(0.01):
            progress(0, 0)

    def phases(live):
        found = samples(live.get("/metrics").text)
        return [dict(labels)["phase"] for name, labels in found if name == "snugfit_start_seconds"]

    with running(start=start, wait=False) as live:
        until(lambda: phases(live) == ["starting"], "loading")
        entered.set()
        until(lambda: phases(live) == ["starting", "reading weights"], "the next phase")


def test_draining_is_told(running, scripted, until):
    engine = scripted(hold_at=0)
    with running(engine) as live:
        assert samples(live.get("/metrics").text)["snugfit_draining", ()] == 0
        asked = threading.Thread(target=live.post)
        asked.start()
        until(lambda: engine.running, "the request")
        live.signal()
        until(lambda: live.service.draining, "draining")
        found = samples(live.get("/metrics").text)
        assert (found["snugfit_draining", ()], found["snugfit_ready", ()]) == (1, 0)
        engine.release()
        asked.join(10)


def test_prometheus_own_linter_has_nothing_to_say(live):
    if not shutil.which("promtool"):
        pytest.skip("promtool is not installed: the metrics are NOT linted; apt-get install prometheus")
    live.post()
    text = live.get("/metrics").text
    found = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_a_scrape_does_not_count_as_a_request(live):
    live.get("/metrics")
    assert sum(live.service.responses.values()) == 0
