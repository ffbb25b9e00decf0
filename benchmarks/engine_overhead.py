"""What HTTP and SSE cost over the bare engine: python -m benchmarks.engine_overhead [MODEL] [--rounds 7].

The same questions go to an engine in this process and, over HTTP, to a `snugfit serve` of the same model, in
turns: one alone, and 16 at once. Reported is the difference in TTFT and in the time of a token, medians of
the differences of the rounds. HTTP's side includes the chat template, JSON, SSE and the client's own parsing,
on the same cores. The prediction is the target: at most 3 ms and 0.3 ms.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.bare import Bare, Times, backend_of
from benchmarks.client import letters
from benchmarks.server import BUILT_IN, Server
from benchmarks.wire import together

MOST_FIRST_MS, MOST_TOKEN_MS = 3.0, 0.3


def over_http(server: Server, prompts: Sequence[str], tokens: int) -> Times:
    bodies = [server.body(prompt, tokens) | {"ignore_eos": True} for prompt in prompts]
    samples = together(server.url, bodies)
    for sample in samples:
        if sample.completion_tokens != tokens:
            raise SystemExit(f"{sample.completion_tokens} tokens where {tokens} were asked for")
    return Times.of([(sample.first, sample.decode_seconds / (tokens - 1)) for sample in samples])


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
    parser.add_argument("model", type=Path, nargs="?", default=BUILT_IN, help="without it, the built-in one")
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-letters", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    arguments = parser.parse_args()
    model, most = arguments.model, max(arguments.streams)
    print(f"predicted: at most {MOST_FIRST_MS} ms to the first token, {MOST_TOKEN_MS} ms a token", flush=True)
    flags = ["--context", str(arguments.context), "--concurrency", str(most)]
    with (
        backend_of(model, arguments.device, arguments.context, most) as backend,
        Server(model, arguments.device, *flags) as server,
    ):
        bare, rows = Bare(backend, arguments.tokens), []
        for streams in arguments.streams:
            rows.append(case(bare, server, streams, arguments))
            print(f"measured: {json.dumps(rows[-1])}", flush=True)
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
