import threading

import pytest

from service.engine.stats import (
    BATCH_BOUNDS,
    E2E_BOUNDS,
    ITL_BOUNDS,
    QUEUE_BOUNDS,
    STEP_BOUNDS,
    TTFT_BOUNDS,
    Capacity,
    Ended,
    HistogramRecorder,
    Meter,
    Occupancy,
    StepCount,
)
from service.engine.types import QueueFull


def meter_of(concurrency=1, max_queue=2):
    return Meter(Capacity(concurrency, 100, max_queue, kv_tokens=400, kv_blocks=25))


def serve(meter, run_s=1.0, reason="stop"):
    meter.enqueue()
    meter.place([0.5], 0, Occupancy(running=1))
    meter.end([Ended(reason, run_s + 0.5, run_s)], Occupancy())


def test_an_observation_falls_into_the_first_bucket_that_holds_it():
    one = HistogramRecorder((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 1.0, 7.0):
        one.observe(seconds)
    snapshot = one.snapshot()
    assert snapshot.counts == (2, 2, 1)
    assert snapshot.total == pytest.approx(8.65)


@pytest.mark.parametrize(
    "bounds", [TTFT_BOUNDS, ITL_BOUNDS, E2E_BOUNDS, QUEUE_BOUNDS, BATCH_BOUNDS, STEP_BOUNDS]
)
def test_bounds_rise(bounds):
    assert list(bounds) == sorted(set(bounds))


def test_a_burst_is_not_refused_while_there_is_room_to_run():
    meter = meter_of(concurrency=2, max_queue=1)
    for _ in range(3):
        meter.enqueue()
    with pytest.raises(QueueFull) as caught:
        meter.enqueue()
    assert (caught.value.waiting, caught.value.limit) == (1, 1)
    assert meter.snapshot().rejected == 1


def test_a_refused_client_is_told_when_a_place_is_likely_to_be_free():
    meter = meter_of(concurrency=4, max_queue=0)
    for run_s in (10.0, 30.0):
        serve(meter, run_s)
    for _ in range(4):
        meter.enqueue()
    meter.place([0] * 4, 0, Occupancy(running=4))
    with pytest.raises(QueueFull) as caught:
        meter.enqueue()
    assert caught.value.retry_after_s == meter.retry_after_s() == pytest.approx(20 / 4)


@pytest.mark.parametrize(("running", "retry_after_s"), [(0, 20), (1, 20), (2, 10), (4, 5)])
def test_places_become_free_as_fast_as_those_who_run_end_and_not_as_the_rows_would_allow(
    running, retry_after_s
):
    meter = meter_of(concurrency=4)
    serve(meter, 20.0)
    for _ in range(4):
        meter.enqueue()
    meter.place([0] * running, 0, Occupancy(running=running))
    assert meter.retry_after_s() == pytest.approx(retry_after_s)


def test_a_refused_client_waits_at_least_a_second():
    meter = meter_of(max_queue=0)
    serve(meter, 0.01)
    meter.enqueue()
    with pytest.raises(QueueFull) as caught:
        meter.enqueue()
    assert caught.value.retry_after_s == 1


def test_aborted_requests_are_counted_and_not_timed():
    meter = meter_of()
    serve(meter)
    serve(meter, reason="cancelled")
    meter.enqueue()
    meter.end([Ended("cancelled", 3.0, None)], Occupancy())
    stats = meter.snapshot()
    assert stats.finished == {"stop": 1, "length": 0, "cancelled": 2, "error": 0}
    assert sum(stats.e2e_latency.counts) == 1
    assert stats.running == stats.waiting == 0


def test_those_who_waited_too_long_are_counted_by_themselves():
    meter = meter_of()
    meter.enqueue()
    meter.end([Ended("timed_out", 60.0, None)], Occupancy())
    stats = meter.snapshot()
    assert (stats.timed_out, stats.waiting, sum(stats.finished.values())) == (1, 0, 0)
    assert sum(stats.queue_time.counts) == 0


def test_a_step_counts_its_tokens_and_those_who_end_with_it():
    meter = meter_of(concurrency=3)
    for _ in range(3):
        meter.enqueue()
    meter.place([0.1, 0.2, 0.3], 1, Occupancy(running=3))
    count = StepCount(3, 0.02, prompt_tokens=40, first_token_s=[0.5], next_token_s=[0.03, 0.03])
    count.ended.append(Ended("length", 2.0, 1.5))
    meter.step(count, Occupancy(2, kv_blocks=5, kv_tokens=70, prefix_queries=60, prefix_hits=16))
    stats = meter.snapshot()
    assert (stats.steps, stats.batch_size.total, stats.step_time.total) == (1, 3, 0.02)
    assert (stats.prompt_tokens, stats.generation_tokens) == (40, 3)
    assert (stats.running, stats.waiting, stats.finished["length"], stats.preemptions) == (2, 0, 1, 1)
    assert (stats.kv_blocks_used, stats.kv_blocks_total) == (5, 25)
    assert (stats.kv_tokens_used, stats.kv_tokens_total) == (70, 400)
    assert (stats.prefix_queries, stats.prefix_hits) == (60, 16)
    assert [sum(h.counts) for h in (stats.time_to_first_token, stats.inter_token_latency)] == [1, 2]


def test_who_makes_room_waits_again():
    meter = meter_of(concurrency=2)
    meter.enqueue()
    meter.enqueue()
    meter.place([0, 0], 0, Occupancy(running=2))
    meter.place([], 1, Occupancy(running=1))
    stats = meter.snapshot()
    assert (stats.running, stats.waiting, stats.preemptions) == (1, 1, 1)


def test_the_dead_serve_nobody_and_keep_their_counters():
    meter = meter_of()
    meter.enqueue()
    meter.place([0], 0, Occupancy(1, 5, 70, prefix_queries=60, prefix_hits=16))
    meter.die([Ended("error", 1.0, 1.0)])
    stats = meter.snapshot()
    assert (stats.alive, stats.running, stats.waiting, stats.kv_blocks_used) == (False, 0, 0, 0)
    assert (stats.prefix_hits, stats.finished["error"]) == (16, 1)


def test_every_snapshot_is_one_moment():
    meter = meter_of(max_queue=10)
    done = threading.Event()

    def work():
        for _ in range(3000):
            serve(meter)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    while not done.is_set():
        stats = meter.snapshot()
        assert stats.running + stats.waiting <= 1
        assert sum(stats.e2e_latency.counts) == stats.finished["stop"]
        assert sum(stats.queue_time.counts) == stats.finished["stop"] + stats.running
    worker.join()
