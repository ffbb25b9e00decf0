"""What a step takes, without engine and HTTP: python -m benchmarks.steps MODEL [--device cuda:0].

Decode steps of so many sequences, 200 tokens each, and prompts of so many tokens, in the runner that
`snugfit serve` makes; the choice of tokens is not counted. On a GPU that is once with our kernels and once
without (--gpu-kernels off). The prediction is the limit of the device, measured in the same run: see
benchmarks/limits.py. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.limits import Work, limits
from benchmarks.server import elsewhere

CONTEXT, PAST, REPEATS, PROMPT_REPEATS, WARM_UP = 2048, 200, 30, 8, 3


def steps(
    model: Path, device: str, kernels: str, decodes: Sequence[int], prompts: Sequence[int]
) -> dict[str, float]:
    """Mean milliseconds of each kind of step. In a process of its own."""
    from loader.load import load
    from service.engine.rows import Row
    from service.engine.runner import make_runner
    from service.planning import make_plan_for
    from service.settings import Settings

    settings = Settings(model=str(model), device=device, context=CONTEXT, concurrency=max(decodes))
    plan = make_plan_for(settings)
    loaded = load(plan)
    runner = make_runner(loaded.model, loaded.device, plan, gpu_kernels=kernels == "auto")
    runner.rehearse()
    width = -(-max(CONTEXT, *prompts) // plan.kv.block_tokens)
    room = min(group.blocks for group in plan.kv.groups)

    def row(number: int, ids: int, past: int) -> Row:
        blocks = [(number * width + at) % room for at in range(width)]
        return Row([5] * ids, past, tuple(blocks for _ in plan.kv.groups), True)

    found = {
        f"decode {count}": _milliseconds(runner, [row(at, 1, PAST) for at in range(count)], REPEATS)
        for count in decodes
    }
    found |= {
        f"prompt {count}": _milliseconds(runner, [row(0, count, 0)], PROMPT_REPEATS) for count in prompts
    }
    runner.close()
    loaded.close()
    return found


def _milliseconds(runner: Any, rows: Sequence[Any], repeats: int) -> float:
    for _ in range(WARM_UP):
        _done(runner.step(rows))
    began = time.perf_counter()
    for _ in range(repeats):
        _done(runner.step(rows))
    return round(1e3 * (time.perf_counter() - began) / repeats, 3)


def _done(logits: Any) -> None:
    """Wait for the device."""
    logits[0, 0].item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N")
    parser.add_argument("--decodes", type=int, nargs="+", default=[1, 2, 4, 16, 64])
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 1024])
    arguments = parser.parse_args()
    work, best = Work.of(arguments.model), elsewhere(limits, arguments.device)
    predicted = {f"decode {n}": 1e3 * work.step_seconds(best, n) for n in arguments.decodes}
    predicted |= {f"prompt {n}": 1e3 * work.prefill_seconds(best, n) for n in arguments.prompts}
    print(f"{best}\npredicted at best, ms: {_rounded(predicted)}", flush=True)
    measured = {}
    for kernels in ("auto", "off") if arguments.device != "cpu" else ("auto",):
        given = (arguments.model, arguments.device, kernels, arguments.decodes, arguments.prompts)
        measured[kernels] = elsewhere(steps, *given)
        print(f"measured, kernels {kernels}, ms: {measured[kernels]}", flush=True)
    result = {
        "benchmark": "steps", "model": arguments.model.name, "device": arguments.device,
        "machine": best.row(), "predicted_ms": _rounded(predicted), "measured_ms": measured,
    }  # fmt: skip
    print(json.dumps(result))


def _rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 3) for name, number in numbers.items()}


if __name__ == "__main__":
    main()
