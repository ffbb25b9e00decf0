"""Counts and times what the engine does; a snapshot is one consistent moment."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from service.engine.types import EngineStats, Histogram, QueueFull

# vLLM's bounds, in seconds, with smaller ones in front where small models are faster.
TTFT_BOUNDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
ITL_BOUNDS = (
    0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
_LONG_BOUNDS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip
E2E_BOUNDS = (0.01, 0.05, 0.1, *_LONG_BOUNDS)
QUEUE_BOUNDS = (0.001, 0.01, 0.1, *_LONG_BOUNDS)
BATCH_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
STEP_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)

# Requests that the mean running time is taken over, and the shortest wait a refused client is told.
RECENT = 32
SHORTEST_RETRY_S = 1.0


class HistogramRecorder:
    """Counts observations; a value equal to a bound belongs to it, as Prometheus has it (`le`)."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._total += value

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The limits that the plan and the settings gave the engine."""

    concurrency: int  # requests that run at the same time
    context: int  # tokens of each
    max_queue: int  # requests that may wait
    kv_tokens: int  # that fit in the pool
    kv_blocks: int


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Who runs and what they hold, at one moment; the counters are since start."""

    running: int = 0
    kv_blocks: int = 0
    kv_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """One request that goes."""

    reason: str  # stop, length, cancelled, error; or timed_out, for one that was never started
    e2e_s: float
    run_s: float | None  # None: it never ran


@dataclass(slots=True)
class StepCount:
    """What one step did, collected without a lock."""

    rows: int
    seconds: float = 0.0
    prompt_tokens: int = 0  # of the requests that have their first token
    first_token_s: list[float] = field(default_factory=list)
    next_token_s: list[float] = field(default_factory=list)
    ended: list[Ended] = field(default_factory=list)


class Meter:
    """Every method is one locked change, so that a snapshot never shows half of one."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._alive = True
        self._inside = 0  # requests, waiting and running
        self._now = Occupancy()
        self._prompt_tokens = self._generation_tokens = self._steps = 0
        self._rejected = self._timed_out = self._out_of_memory = self._preemptions = 0
        self._finished: Counter[str] = Counter(stop=0, length=0, cancelled=0, error=0)
        self._run_times: deque[float] = deque(maxlen=RECENT)
        self._batch, self._step_time = HistogramRecorder(BATCH_BOUNDS), HistogramRecorder(STEP_BOUNDS)
        self._first_token, self._inter_token = HistogramRecorder(TTFT_BOUNDS), HistogramRecorder(ITL_BOUNDS)
        self._e2e, self._queue = HistogramRecorder(E2E_BOUNDS), HistogramRecorder(QUEUE_BOUNDS)

    def enqueue(self) -> None:
        """Count a request in. Raises QueueFull.

        What counts is the sum of waiting and running: a burst that comes before the engine's thread has taken
        the first of it must not be refused while there is room to run.
        """
        with self._lock:
            waiting = self._inside - self._capacity.concurrency
            if waiting >= self._capacity.max_queue:
                self._rejected += 1
                raise QueueFull(max(waiting, 0), self._capacity.max_queue, self._retry_after_s())
            self._inside += 1

    def place(self, queue_s: Iterable[float], preempted: int, now: Occupancy) -> None:
        """Before a step: how long those waited who begin with it, and how many had to make room."""
        with self._lock:
            for seconds in queue_s:
                self._queue.observe(seconds)
            self._preemptions += preempted
            self._now = now

    def step(self, count: StepCount, now: Occupancy) -> None:
        with self._lock:
            self._steps += 1
            self._batch.observe(count.rows)
            self._step_time.observe(count.seconds)
            self._prompt_tokens += count.prompt_tokens
            self._generation_tokens += len(count.first_token_s) + len(count.next_token_s)
            for seconds in count.first_token_s:
                self._first_token.observe(seconds)
            for seconds in count.next_token_s:
                self._inter_token.observe(seconds)
            self._end(count.ended, now)

    def end(self, ended: Iterable[Ended], now: Occupancy) -> None:
        """Count requests out, between steps."""
        with self._lock:
            self._end(ended, now)

    def run_out(self, now: Occupancy) -> None:
        """Count a step that the device had no memory for and that is tried again."""
        with self._lock:
            self._out_of_memory += 1
            self._now = now

    def die(self, ended: Iterable[Ended] = ()) -> None:
        """Nobody is served any more; those who were here are counted out."""
        with self._lock:
            self._alive = False
            self._end(ended, replace(self._now, running=0, kv_blocks=0, kv_tokens=0))

    def retry_after_s(self) -> float:
        with self._lock:
            return self._retry_after_s()

    def snapshot(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                alive=self._alive,
                running=self._now.running,
                waiting=self._inside - self._now.running,
                waiting_limit=self._capacity.max_queue,
                context=self._capacity.context,
                kv_tokens_used=self._now.kv_tokens,
                kv_tokens_total=self._capacity.kv_tokens,
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
                finished=dict(self._finished),
                rejected=self._rejected,
                timed_out=self._timed_out,
                kv_blocks_used=self._now.kv_blocks,
                kv_blocks_total=self._capacity.kv_blocks,
                preemptions=self._preemptions,
                prefix_queries=self._now.prefix_queries,
                prefix_hits=self._now.prefix_hits,
                steps=self._steps,
                out_of_memory=self._out_of_memory,
                batch_size=self._batch.snapshot(),
                step_time=self._step_time.snapshot(),
                time_to_first_token=self._first_token.snapshot(),
                inter_token_latency=self._inter_token.snapshot(),
                e2e_latency=self._e2e.snapshot(),
                queue_time=self._queue.snapshot(),
            )

    def _end(self, ended: Iterable[Ended], now: Occupancy) -> None:
        """Only answers that were given whole are timed: aborted ones would make the engine look fast."""
        for one in ended:
            self._inside -= 1
            if one.reason == "timed_out":
                self._timed_out += 1
                continue
            self._finished[one.reason] += 1
            if one.run_s is not None and one.reason in ("stop", "length"):
                self._e2e.observe(one.e2e_s)
                self._run_times.append(one.run_s)
        self._now = now

    def _retry_after_s(self) -> float:
        """When a place is likely to be free: one of those that run ends every (mean time / their number).

        They may be fewer than `concurrency`, because the pool has no blocks for more.
        """
        if not self._run_times:
            return SHORTEST_RETRY_S
        mean_s = sum(self._run_times) / len(self._run_times)
        running = min(max(1, self._now.running), self._capacity.concurrency)
        return max(SHORTEST_RETRY_S, mean_s / running)
