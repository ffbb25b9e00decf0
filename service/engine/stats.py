"""Counts and times what the engine does; a snapshot is one consistent moment."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter, deque
from dataclasses import dataclass

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

# Requests that the mean running time is taken over, and the shortest wait a refused client is told.
RECENT = 32
SHORTEST_RETRY_S = 1.0


class HistogramRecorder:
    """Counts observations; a value equal to a bound belongs to it, as Prometheus has it (`le`)."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._total = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._total += seconds

    def snapshot(self) -> Histogram:
        return Histogram(self._bounds, tuple(self._counts), self._total)


@dataclass(frozen=True, slots=True)
class Capacity:
    """The limits that the plan and the settings gave the engine."""

    concurrency: int  # requests that run at the same time
    context: int  # tokens of each
    max_queue: int  # requests that may wait


class Meter:
    """Every method is one locked change, so that a snapshot never shows half of one."""

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._alive = True
        self._running = self._waiting = self._kv_tokens = 0
        self._prompt_tokens = self._generation_tokens = self._rejected = 0
        self._finished: Counter[str] = Counter(stop=0, length=0, cancelled=0, error=0)
        self._run_times: deque[float] = deque(maxlen=RECENT)
        self._first_token = HistogramRecorder(TTFT_BOUNDS)
        self._inter_token = HistogramRecorder(ITL_BOUNDS)
        self._e2e = HistogramRecorder(E2E_BOUNDS)
        self._queue = HistogramRecorder(QUEUE_BOUNDS)

    def enqueue(self) -> None:
        """Count a request in. Raises QueueFull.

        What counts is the sum of waiting and running: a burst that comes before the engine's thread has taken
        the first of it must not be refused while slots are free.
        """
        with self._lock:
            waiting = self._waiting + self._running - self._capacity.concurrency
            if waiting >= self._capacity.max_queue:
                self._rejected += 1
                raise QueueFull(max(waiting, 0), self._capacity.max_queue, self._retry_after_s())
            self._waiting += 1

    def admit(self, queue_s: float) -> None:
        with self._lock:
            self._waiting -= 1
            self._running += 1
            self._queue.observe(queue_s)

    def read_prompt(self, tokens: int) -> None:
        with self._lock:
            self._prompt_tokens += tokens

    def first_token(self, seconds: float) -> None:
        with self._lock:
            self._generation_tokens += 1
            self._first_token.observe(seconds)

    def next_token(self, seconds: float) -> None:
        with self._lock:
            self._generation_tokens += 1
            self._inter_token.observe(seconds)

    def hold_kv(self, tokens: int) -> None:
        """The tokens that all caches hold now."""
        with self._lock:
            self._kv_tokens = tokens

    def finish(self, reason: str, e2e_s: float, run_s: float | None) -> None:
        """Count a request out; `run_s` is None for one that never ran.

        Only answers that were given whole are timed: aborted ones would make the engine look fast.
        """
        with self._lock:
            self._finished[reason] += 1
            if run_s is None:
                self._waiting -= 1
            else:
                self._running -= 1
            if run_s is not None and reason in ("stop", "length"):
                self._e2e.observe(e2e_s)
                self._run_times.append(run_s)

    def die(self) -> None:
        with self._lock:
            self._alive = False

    def snapshot(self) -> EngineStats:
        with self._lock:
            return EngineStats(
                alive=self._alive,
                running=self._running,
                waiting=self._waiting,
                waiting_limit=self._capacity.max_queue,
                context=self._capacity.context,
                kv_tokens_used=self._kv_tokens,
                kv_tokens_total=self._capacity.context * self._capacity.concurrency,
                prompt_tokens=self._prompt_tokens,
                generation_tokens=self._generation_tokens,
                finished=dict(self._finished),
                rejected=self._rejected,
                time_to_first_token=self._first_token.snapshot(),
                inter_token_latency=self._inter_token.snapshot(),
                e2e_latency=self._e2e.snapshot(),
                queue_time=self._queue.snapshot(),
            )

    def _retry_after_s(self) -> float:
        """When a place is likely to be free: one of the running ones ends every (mean time / concurrency)."""
        if not self._run_times:
            return SHORTEST_RETRY_S
        mean_s = sum(self._run_times) / len(self._run_times)
        return max(SHORTEST_RETRY_S, mean_s / self._capacity.concurrency)
