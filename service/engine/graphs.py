"""CUDA graphs of decode steps: one for each of a few batch sizes, replayed instead of launching kernels.

A step's tensors lie at addresses that follow from its form, so a graph that was recorded over a padded form
reads every later step of that form. All graphs share one memory pool and write their logits into one buffer:
together they hold what the largest of them needs.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import Protocol

import torch

from service.engine.batch import Batcher, Step
from service.engine.rows import Row

Forward = Callable[[Step], torch.Tensor]  # logits [samples, vocab]

log = logging.getLogger(__name__)


class Graph(Protocol):
    def replay(self) -> None: ...


class Recorder(Protocol):
    """Runs `work` once or more and returns what runs it again."""

    def __call__(self, work: Callable[[], None]) -> Graph: ...


class CudaRecorder:
    """Records into one memory pool and on one stream, after a first run in which libraries set themselves up.

    That run is on the stream of all other steps: what it frees stays of use to them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, work: Callable[[], None]) -> Graph:
        with torch.cuda.device(self._device):
            work()
            graph = torch.cuda.CUDAGraph()
            # What other threads ask of the driver, as a scrape of memory statistics, does no harm.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                work()
        return graph


class DecodeGraphs:
    """Steps of one token a row, at most `concurrency` rows, rounded up to a power of two."""

    def __init__(self, batcher: Batcher, forward: Forward, concurrency: int, recorder: Recorder) -> None:
        self._batcher, self._forward, self._recorder = batcher, forward, recorder
        self._sizes = sizes(concurrency)
        self._graphs: dict[int, Graph] = {}
        self._logits: torch.Tensor | None = None

    def record(self, row: Row) -> bool:
        """Record every size, the largest first, over steps of `row`. False: it failed, steps run eagerly."""
        try:
            for size in reversed(self._sizes):
                step = self._batcher.build([row] * size, padded_to=size)
                self._graphs[size] = self._recorder(lambda step=step: self._run(step))  # type: ignore[misc]
        except Exception as error:
            # Some models ask the host in the middle of a step, as experts that count their tokens do.
            log.warning("steps are not recorded as CUDA graphs: %s: %s", type(error).__name__, error)
            self.close()
            return False
        return True

    def step(self, rows: Ids[Row]) -> torch.Tensor | None:
        """Logits [rows with `sample`, vocab], good until the next step; None for rows no graph is for."""
        if not self._graphs or len(rows) > self._sizes[-1] or any(len(row.ids) > 1 for row in rows):
            return None
        size = self._sizes[bisect_left(self._sizes, len(rows))]
        self._batcher.build(rows, padded_to=size)
        self._graphs[size].replay()
        assert self._logits is not None
        sampled = [at for at, row in enumerate(rows) if row.sample]
        if len(sampled) == len(rows):
            return self._logits[: len(rows)]
        return self._logits[sampled]

    def close(self) -> None:
        self._graphs, self._logits = {}, None

    def _run(self, step: Step) -> None:
        logits = self._forward(step)
        if self._logits is None:
            self._logits = torch.empty_like(logits)  # the largest size comes first
        self._logits[: len(logits)].copy_(logits)


def sizes(concurrency: int) -> list[int]:
    """1, 2, 4 ... below `concurrency`, and that."""
    powers = [1 << bits for bits in range(concurrency.bit_length())]
    return sorted({*powers, concurrency})
