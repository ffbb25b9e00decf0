"""What the engine does between two forwards: python -m benchmarks.host_work [MODEL] [--device cuda:0].

So many requests decode together. From the end of one step's forward to the beginning of the next one's the
engine's thread chooses tokens, counts, tells the clients' event loop, schedules and builds the batch, while
the loop makes text on another thread: that is the host's work of a step. On a GPU the card chooses, and
telling goes on beside it: there the host's work is from the choices in hand to the next step's launch, while
the card has nothing to do. Reported are medians over all steps in which every request decodes. The
prediction is the target: at most a tenth of the step at 16 requests of a 0.5B, and at most 1 ms at 64 on the
host of a GPU.

--simulated puts a device in the model's place that takes a while and no core, as a GPU does. The host's work
is real, and the vocabulary so small that a choice costs what it costs to ask for it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.bare import Bare, backend_of
from benchmarks.client import letters
from benchmarks.server import BUILT_IN
from loader.load import LoadedModel
from service.backend import Backend

MOST_SHARE, MOST_MS = 0.1, 1.0
CONTEXT, PROMPT_LETTERS = 512, 100
SIMULATED_MS, SIMULATED_VOCAB = 10.0, 100


def simulate(backend: Backend, model: Any) -> None:
    """Let the thread wait, as for a card, where the model would compute."""
    current = backend.engine._runner._current  # type: ignore[attr-defined]

    def forward(input_ids: torch.Tensor, logits_to_keep: torch.Tensor, **_more: Any) -> Any:
        current.on(input_ids.device)  # as the first layer does
        time.sleep(SIMULATED_MS / 1e3)
        logits = torch.zeros(1, len(logits_to_keep), SIMULATED_VOCAB)
        logits[..., -1] = 1
        return SimpleNamespace(logits=logits)

    model.forward = forward


@dataclass(frozen=True)
class Forward:
    tokens: int
    began: float  # seconds
    ended: float


class Watch(ABC):
    """Every forward while the block runs."""

    def __init__(self) -> None:
        self.seen: list[Forward] = []
        self._began = 0.0

    @abstractmethod
    def __enter__(self) -> Watch: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    def full_steps(self, streams: int) -> list[tuple[float, float]]:
        """(forward, host work before the next) in milliseconds, of steps where each stream has a token and
        of which the next is one, too."""
        return [
            (1e3 * (one.ended - one.began), 1e3 * (other.began - one.ended))
            for one, other in pairwise(self.seen)
            if one.tokens == other.tokens == streams
        ]


class Forwards(Watch):
    """Of a model that computes when it is called, seen by its hooks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def __enter__(self) -> Forwards:
        self._hooks = [
            self._model.register_forward_pre_hook(self._begin),
            self._model.register_forward_hook(self._end, with_kwargs=True),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, model: Any, args: Any) -> None:  # noqa: ARG002
        self._began = time.perf_counter()

    def _end(self, model: Any, args: Any, kwargs: Any, output: Any) -> None:  # noqa: ARG002
        self.seen.append(Forward(kwargs["input_ids"].shape[1], self._began, time.perf_counter()))


class Launches(Watch):
    """Of a GPU: a step is launched when `meanwhile` is called, and over when its choices have come back."""

    def __init__(self, backend: Backend) -> None:
        super().__init__()
        self._runner = backend.engine._runner  # type: ignore[attr-defined]
        self._sampler = backend.engine._sampler  # type: ignore[attr-defined]
        self._tokens = 0

    def __enter__(self) -> Launches:
        self._step, self._choose = self._runner.step, self._sampler.choose
        self._runner.step, self._sampler.choose = self._launch, self._chosen
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.step, self._sampler.choose = self._step, self._choose

    def _launch(self, rows: Any, meanwhile: Callable[[], None]) -> Any:
        def launched() -> None:
            self._began = time.perf_counter()
            meanwhile()

        self._tokens = sum(len(row.ids) for row in rows)
        return self._step(rows, launched)

    def _chosen(self, *arguments: Any) -> Any:
        choices = self._choose(*arguments)
        self.seen.append(Forward(self._tokens, self._began, time.perf_counter()))
        return choices


def case(backend: Backend, watch: Watch, streams: int, tokens: int) -> dict[str, Any]:
    rng = random.Random(streams)
    bare = Bare(backend, tokens)
    bare.run([letters(rng, PROMPT_LETTERS) for _ in range(streams)])  # warms up
    with watch as forwards:
        bare.run([letters(rng, PROMPT_LETTERS) for _ in range(streams)])
    steps = forwards.full_steps(streams)
    if len(steps) < tokens // 2:
        raise SystemExit(f"{streams} requests decoded together in {len(steps)} steps only")
    forward, host = (list(column) for column in zip(*steps, strict=True))
    return {
        "streams": streams,
        "steps": len(steps),
        "forward_ms": round(median(forward), 3),
        "host_ms": round(median(host), 3),
        "host_p90_ms": round(quantiles(host, n=10)[-1], 3),
        "host_share": round(median(host) / (median(host) + median(forward)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", default=BUILT_IN, help="without it, the built-in one")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--simulated", action="store_true", help="a device that needs no core")
    arguments = parser.parse_args()
    if arguments.simulated and arguments.device != "cpu":
        parser.error("--simulated takes the place of a device: leave --device out")
    print(
        f"predicted: at most {MOST_SHARE:.0%} of a 0.5B's step at 16, at most {MOST_MS} ms at 64", flush=True
    )
    rows = []
    with backend_of(arguments.model, arguments.device, CONTEXT, max(arguments.streams)) as backend:
        assert isinstance(backend.memory, LoadedModel)
        model = backend.memory.model
        if arguments.simulated:
            simulate(backend, model)
        for streams in arguments.streams:
            watch = Forwards(model) if arguments.device == "cpu" else Launches(backend)
            rows.append(case(backend, watch, streams, arguments.tokens))
            print(f"measured: {json.dumps(rows[-1])}", flush=True)
    result = {
        "benchmark": "host_work",
        "model": arguments.model.name,
        "device": "simulated" if arguments.simulated else arguments.device,
        "target": {"share_at_16": MOST_SHARE, "ms_at_64": MOST_MS},
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
