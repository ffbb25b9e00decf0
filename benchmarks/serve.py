"""Latency and throughput over HTTP: python -m benchmarks.serve MODEL [--concurrency 1 4 16].

Starts `snugfit serve` on the CPU (or --device cuda:0), keeps so many streaming requests in flight, reports
TTFT, inter-token latency and output tokens per second. The prediction is the limit of the device, measured in
the same run: see benchmarks/limits.py. With --budget, some weights are copied in at every step, which the
prediction leaves out. Prompts are random letters, so that no two begin alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from pathlib import Path
from typing import Any

from benchmarks.client import Sample, letters, quantile, together
from benchmarks.limits import Work, limits
from benchmarks.server import Server, elsewhere


def load(server: Server, concurrency: int, arguments: argparse.Namespace) -> tuple[float, list[Sample]]:
    """(seconds, samples) of `requests` streams, `concurrency` of them at any time."""
    rng = random.Random(concurrency)
    count = max(arguments.requests, concurrency)
    extra = {"ignore_eos": True} if arguments.ignore_eos else {}
    bodies = [
        server.body(letters(rng, arguments.prompt_tokens), arguments.tokens) | extra for _ in range(count)
    ]
    return asyncio.run(together(server.url, bodies, concurrency))


def row(concurrency: int, seconds: float, samples: list[Sample]) -> dict[str, Any]:
    gaps = [gap for sample in samples for gap in sample.gaps]
    firsts = [sample.first for sample in samples]
    tokens = sum(sample.completion_tokens or 0 for sample in samples)
    return {
        "concurrency": concurrency,
        "requests": len(samples),
        "prompt_tokens": round(statistics.mean(sample.prompt_tokens or 0 for sample in samples)),
        "completion_tokens": tokens,
        "ttft_ms": _spread(firsts),
        "itl_ms": _spread(gaps),
        "tokens_per_second": round(tokens / seconds, 2),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    return {name: round(1e3 * quantile(seconds, share), 2) for name, share in (("p50", 0.5), ("p95", 0.95))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--budget", help="of the device, as for snugfit serve: 16GB")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=4, help="at each concurrency, and at least that many")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--ignore-eos", action="store_true", help="every answer has all of --tokens")
    arguments = parser.parse_args()
    work, best = Work.of(arguments.model), elsewhere(limits, arguments.device)
    step_ms = 1e3 * work.step_seconds(best)
    prefill_ms = 1e3 * work.prefill_seconds(best, arguments.prompt_tokens)
    print(
        f"{arguments.device} ({best})\n"
        f"predicted at best: {step_ms:.1f} ms a step, {1e3 / step_ms:.1f} tokens/s alone, "
        f"{prefill_ms:.0f} ms to read {arguments.prompt_tokens} tokens",
        flush=True,
    )
    rows = []
    context = 2 * (arguments.prompt_tokens + arguments.tokens) + 64
    flags = ["--context", str(context), "--concurrency", str(max(arguments.concurrency))]
    flags += ["--budget", arguments.budget] if arguments.budget else []
    with Server(arguments.model, arguments.device, *flags) as server:
        server.chat("warm up", 4)
        for concurrency in arguments.concurrency:
            seconds, samples = load(server, concurrency, arguments)
            rows.append(row(concurrency, seconds, samples))
            print(f"measured: {json.dumps(rows[-1])}", flush=True)
    result = {
        "benchmark": "serve",
        "model": arguments.model.name,
        "device": arguments.device,
        "budget": arguments.budget,
        "predicted": {"step_ms": round(step_ms, 2), "prefill_ms": round(prefill_ms, 1)},
        "machine": best.row(),
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
