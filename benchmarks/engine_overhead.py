"""What HTTP and SSE cost over the bare engine: python -m benchmarks.engine_overhead [MODEL] [--rounds 7].

The same questions go to an engine in this process and, over HTTP, to a `snugfit serve` of the same model, in
turns: one alone, and 16 at once. Reported is the difference in TTFT and in the time of a token, medians of
the differences of the rounds. HTTP's side includes the chat template, JSON, SSE and the client's own parsing,
on the same cores. The prediction is the target: at most 3 ms and 0.3 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.client import letters, together
from benchmarks.server import Server
from service.backend import Backend, Progress
from service.boot import start_backend
from service.engine.types import Request, SamplingParams
from service.planning import make_plan_for
from service.settings import Settings

MOST_FIRST_MS, MOST_TOKEN_MS = 3.0, 0.3


@dataclass(frozen=True)
class Times:
    """Medians over the streams of one run, in milliseconds."""

    first: float
    token: float

    @classmethod
    def of(cls, streams: Sequence[tuple[float, float]]) -> Times:
        """From (seconds to the first token, seconds of each further one)."""
        firsts, tokens = zip(*streams, strict=True)
        return cls(1e3 * median(firsts), 1e3 * median(tokens))

    def minus(self, other: Times) -> Times:
        return Times(self.first - other.first, self.token - other.token)


class Bare:
    """The engine without a web server, asked from an event loop as the server does."""

    def __init__(self, backend: Backend, tokens: int) -> None:
        self._backend = backend
        self._params = SamplingParams(max_tokens=tokens, temperature=0)

    def run(self, prompts: Sequence[str]) -> Times:
        requests = [
            Request(prompt[:16], self._backend.template.encode([_turn(prompt)]), self._params)
            for prompt in prompts
        ]
        return Times.of(asyncio.run(self._together(requests)))

    async def _together(self, requests: Sequence[Request]) -> list[tuple[float, float]]:
        return await asyncio.gather(*map(self._one, requests))

    async def _one(self, request: Request) -> tuple[float, float]:
        started, arrived = time.perf_counter(), []
        async for event in self._backend.engine.generate(request):
            if event.text:
                arrived.append(time.perf_counter())
        return arrived[0] - started, (arrived[-1] - arrived[0]) / (self._params.max_tokens - 1)


def over_http(server: Server, prompts: Sequence[str], tokens: int) -> Times:
    bodies = [server.body(prompt, tokens) | {"ignore_eos": True} for prompt in prompts]
    _, samples = asyncio.run(together(server.url, bodies))
    for sample in samples:
        if sample.completion_tokens != tokens:
            raise SystemExit(f"{sample.completion_tokens} tokens where {tokens} were asked for")
    return Times.of([(sample.first, sample.decode_seconds / (tokens - 1)) for sample in samples])


def _turn(prompt: str) -> dict[str, str]:
    return {"role": "user", "content": prompt}


def case(bare: Bare, server: Server, streams: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns, the first of each round alternating; a round before is not counted."""
    rng = random.Random(streams)
    pairs = []
    for number in range(arguments.rounds + 1):
        prompts = [letters(rng, arguments.prompt_letters) for _ in range(streams)]
        if number % 2:
            inside, http = bare.run(prompts), over_http(server, prompts, arguments.tokens)
        else:
            http, inside = over_http(server, prompts, arguments.tokens), bare.run(prompts)
        pairs.append((inside, http))
    added = [http.minus(inside) for inside, http in pairs[1:]]
    return {
        "streams": streams,
        "bare": {"ttft_ms": _middle(inside.first for inside, _ in pairs[1:]),
                 "token_ms": _middle(inside.token for inside, _ in pairs[1:])},
        "http": {"ttft_ms": _middle(http.first for _, http in pairs[1:]),
                 "token_ms": _middle(http.token for _, http in pairs[1:])},
        "added": {"ttft_ms": _middle(times.first for times in added),
                  "token_ms": _middle(times.token for times in added)},
    }  # fmt: skip


def _middle(values: Any) -> float:
    return round(median(values), 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="without it, the built-in model")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-letters", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    arguments = parser.parse_args()
    model = arguments.model or Path(str(resources.files("service") / "demo"))
    most = max(arguments.streams)
    print(f"predicted: at most {MOST_FIRST_MS} ms to the first token, {MOST_TOKEN_MS} ms a token", flush=True)
    settings = Settings(
        model=str(model), device=arguments.device, context=arguments.context, concurrency=most
    )
    backend = start_backend(settings, make_plan_for(settings), Progress())
    flags = ["--context", str(arguments.context), "--concurrency", str(most)]
    try:
        with Server(model, arguments.device, *flags) as server:
            bare, rows = Bare(backend, arguments.tokens), []
            for streams in arguments.streams:
                rows.append(case(bare, server, streams, arguments))
                print(f"measured: {json.dumps(rows[-1])}", flush=True)
    finally:
        backend.close()
    result = {
        "benchmark": "engine_overhead",
        "model": model.name,
        "device": arguments.device,
        "target": {"ttft_ms": MOST_FIRST_MS, "token_ms": MOST_TOKEN_MS},
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
