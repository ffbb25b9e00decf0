import threading

import pytest

from service.engine.stats import (
    E2E_BOUNDS,
    ITL_BOUNDS,
    QUEUE_BOUNDS,
    TTFT_BOUNDS,
    Capacity,
    HistogramRecorder,
    Meter,
)
from service.engine.types import QueueFull


def meter_of(concurrency=1, max_queue=2):
    return Meter(Capacity(concurrency, 100, max_queue))


def serve(meter, run_s=1.0, reason="stop"):
    meter.enqueue()
    meter.admit(0.5)
    meter.finish(reason, run_s + 0.5, run_s)


def test_an_observation_falls_into_the_first_bucket_that_holds_it():
    one = HistogramRecorder((0.1, 1.0))
    for seconds in (0.05, 0.1, 0.5, 1.0, 7.0):
        one.observe(seconds)
    snapshot = one.snapshot()
    assert snapshot.counts == (2, 2, 1)
    assert snapshot.total == pytest.approx(8.65)


@pytest.mark.parametrize("bounds", [TTFT_BOUNDS, ITL_BOUNDS, E2E_BOUNDS, QUEUE_BOUNDS])
def test_bounds_rise(bounds):
    assert list(bounds) == sorted(set(bounds))


def test_a_burst_is_not_refused_while_slots_are_free():
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
    with pytest.raises(QueueFull) as caught:
        meter.enqueue()
    assert caught.value.retry_after_s == pytest.approx(20 / 4)


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
    meter.finish("cancelled", 3.0, None)
    stats = meter.snapshot()
    assert stats.finished == {"stop": 1, "length": 0, "cancelled": 2, "error": 0}
    assert sum(stats.e2e_latency.counts) == 1
    assert stats.running == stats.waiting == 0


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
