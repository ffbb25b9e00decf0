"""Latency and throughput over HTTP: python -m benchmarks.serve MODEL [--concurrency 1 4 16].

Starts `snugfit serve` on the CPU (or --device cuda:0), keeps so many streaming requests in flight, reports
TTFT, inter-token latency and output tokens per second. The prediction is the limit of the device, measured in
the same run: a decode step reads every matrix once, a prefill does 2 operations for each parameter of the
layers and token. With --budget, some weights are copied in at every step, which the prediction leaves out.
Prompts are random letters, so that no two begin alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import string
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.server import Server, elsewhere
from loader import checkpoint
from loader.footprint import measure

READ_BYTES = 1 << 30
GEMM_SIZES = {"cpu": 2048, "cuda": 8192}  # a GPU is not busy with less
REPEATS = 5


@dataclass(frozen=True)
class Limits:
    """What this machine can do at best, now."""

    read_bytes_per_second: float
    operations_per_second: float  # bf16 matrix multiplication
    device: str  # its name, or how many threads the CPU has for us


def limits(device: str) -> Limits:
    """The best of a few runs each: a sum over 1 GiB, and a square bf16 product of random numbers."""
    size = GEMM_SIZES[torch.device(device).type]
    block = torch.ones(READ_BYTES // 4, dtype=torch.float32, device=device)
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device)
    read = READ_BYTES / min(_seconds(block.sum, device) for _ in range(REPEATS))
    operations = 2 * size**3 / min(_seconds(lambda: left @ left, device) for _ in range(REPEATS))
    on_cpu = device == "cpu"
    name = f"{torch.get_num_threads()} threads" if on_cpu else torch.cuda.get_device_name(device)
    return Limits(read, operations, name)


def _seconds(work: Any, device: str) -> float:
    started = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Sample:
    """One streamed answer; times in seconds."""

    first: float
    gaps: list[float]
    prompt_tokens: int
    completion_tokens: int


async def ask(client: httpx.AsyncClient, server: Server, prompt: str, max_tokens: int) -> Sample:
    body = server.body(prompt, max_tokens)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    started, arrived, usage = time.perf_counter(), [], {}
    rest = b""
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for chunk in response.aiter_bytes():
            *frames, rest = (rest + chunk).split(b"\n\n")
            for frame in frames:
                if not frame.startswith(b"data: {"):
                    continue
                event = json.loads(frame.removeprefix(b"data: "))
                if event["choices"] and event["choices"][0]["delta"].get("content"):
                    arrived.append(time.perf_counter())
                usage = event.get("usage") or usage
    gaps = [after - before for before, after in pairwise(arrived)]
    return Sample(arrived[0] - started, gaps, usage["prompt_tokens"], usage["completion_tokens"])


async def load(server: Server, concurrency: int, arguments: argparse.Namespace) -> tuple[float, list[Sample]]:
    """(seconds, samples) of `requests` streams, `concurrency` of them at any time."""
    rng = random.Random(concurrency)
    prompts = [_prompt(rng, arguments.prompt_tokens) for _ in range(max(arguments.requests, concurrency))]
    places = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=server.url, timeout=3600) as client:

        async def one(prompt: str) -> Sample:
            async with places:
                return await ask(client, server, prompt, arguments.tokens)

        started = time.perf_counter()
        samples = await asyncio.gather(*map(one, prompts))
        return time.perf_counter() - started, samples


def _prompt(rng: random.Random, letters: int) -> str:
    return "".join(rng.choices(string.ascii_lowercase, k=letters))


def row(concurrency: int, seconds: float, samples: list[Sample]) -> dict[str, Any]:
    gaps = [gap for sample in samples for gap in sample.gaps]
    firsts = [sample.first for sample in samples]
    tokens = sum(sample.completion_tokens for sample in samples)
    return {
        "concurrency": concurrency,
        "requests": len(samples),
        "prompt_tokens": round(statistics.mean(sample.prompt_tokens for sample in samples)),
        "completion_tokens": tokens,
        "ttft_ms": _spread(firsts),
        "itl_ms": _spread(gaps),
        "tokens_per_second": round(tokens / seconds, 2),
    }


def _spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    at = {"p50": 0.5, "p95": 0.95}
    return {name: round(1e3 * ordered[round(share * (len(ordered) - 1))], 2) for name, share in at.items()}


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
    arguments = parser.parse_args()
    footprint, best = measure(checkpoint.read(arguments.model)), elsewhere(limits, arguments.device)
    layer_bytes = sum(unit.n_bytes for unit in footprint.units if unit.layer is not None)
    head_bytes = footprint.vocab_size * footprint.shape.hidden * footprint.dtype_bytes
    step_ms = 1e3 * (layer_bytes + head_bytes) / best.read_bytes_per_second
    operations = 2 * layer_bytes // footprint.dtype_bytes * arguments.prompt_tokens
    prefill_ms = 1e3 * operations / best.operations_per_second
    print(
        f"{arguments.device} ({best.device}): reads {best.read_bytes_per_second / 1e9:.1f} GB/s, "
        f"multiplies {best.operations_per_second / 1e9:.0f} GFLOP/s in bf16\n"
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
            seconds, samples = asyncio.run(load(server, concurrency, arguments))
            rows.append(row(concurrency, seconds, samples))
            print(f"measured: {json.dumps(rows[-1])}", flush=True)
    result = {
        "benchmark": "serve",
        "model": arguments.model.name,
        "device": arguments.device,
        "budget": arguments.budget,
        "predicted": {"step_ms": round(step_ms, 2), "prefill_ms": round(prefill_ms, 1)},
        "machine": {
            "read_gb_per_second": round(best.read_bytes_per_second / 1e9, 1),
            "bf16_gflop_per_second": round(best.operations_per_second / 1e9),
            "device": best.device,
        },
        "rows": rows,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
