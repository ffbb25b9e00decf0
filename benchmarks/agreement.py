"""How often greedy answers in bf16 are those of transformers: python -m benchmarks.agreement MODEL.

Serves random prompts at the same time through the engine and asks transformers.generate for each by itself,
in bf16 and in float32. In bf16 two right programs may round differently and then choose another token when
two are nearly as likely; how often transformers' bf16 leaves its own float32 says how much of it to expect.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.server import elsewhere
from loader import checkpoint, probe
from loader.budget import MemoryBudget
from loader.load import load
from loader.plan import make_plan
from service.engine.engine import StepEngine
from service.engine.runner import make_runner
from service.engine.types import Request, SamplingParams

Answers = list[list[int]]


@dataclass(frozen=True)
class Work:
    """The same prompts for everyone; token ids below `vocab`."""

    model: Path
    count: int
    longest: int
    tokens: int
    vocab: int

    def prompts(self) -> Answers:
        rng = random.Random(11)
        lengths = (rng.randrange(1, self.longest + 1) for _ in range(self.count))
        return [[rng.randrange(self.vocab) for _ in range(length)] for length in lengths]


def served(work: Work) -> Answers:
    """By the engine, all at once, in bf16 on the CPU."""
    spec = checkpoint.read(str(work.model))
    budget = MemoryBudget.parse(None, None, "cpu", probe.machine())
    plan = make_plan(spec, budget, context=work.longest + work.tokens + 1, dtype="bfloat16")
    loaded = load(plan)
    engine = StepEngine(
        make_runner(loaded.model, loaded.device, plan),
        AutoTokenizer.from_pretrained(str(work.model)),
        max_queue=work.count,
    )
    try:
        return asyncio.run(_all(engine, work))
    finally:
        engine.close()
        loaded.close()


async def _all(engine: StepEngine, work: Work) -> Answers:
    async def one(name: int, ids: list[int]) -> list[int]:
        params = SamplingParams(max_tokens=work.tokens, temperature=0.0)
        events = engine.generate(Request(str(name), tuple(ids), params))
        return [event.token_id async for event in events if event.token_id is not None]

    return list(await asyncio.gather(*(one(*item) for item in enumerate(work.prompts()))))


def generated(work: Work, dtype: str) -> Answers:
    """By transformers, one after the other."""
    model = AutoModelForCausalLM.from_pretrained(str(work.model), dtype=getattr(torch, dtype)).eval()
    return [_generate(model, ids, work.tokens) for ids in work.prompts()]


@torch.inference_mode()
def _generate(model: Any, ids: list[int], tokens: int) -> list[int]:
    options = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones(1, len(ids), dtype=torch.long)
    output = model.generate(torch.tensor([ids]), attention_mask=mask, **options)
    return list(map(int, output[0, len(ids) :]))


def agreement(mine: Answers, theirs: Answers) -> dict[str, float]:
    """Shares of whole answers, and of tokens before the first that differs."""
    same = [
        len(list(takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True))))
        for a, b in zip(mine, theirs, strict=True)
    ]
    return {
        "whole_answers": round(statistics.mean(n == len(a) for n, a in zip(same, theirs, strict=True)), 3),
        "tokens_before_the_first_difference": round(sum(same) / sum(map(len, theirs)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--longest", type=int, default=200, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=32, help="to generate for each")
    arguments = parser.parse_args()
    vocab = int(checkpoint.read(str(arguments.model)).config["vocab_size"])
    work = Work(arguments.model, arguments.prompts, arguments.longest, arguments.tokens, vocab)
    print("predicted: as often as transformers' bf16 agrees with its own float32, or more", flush=True)
    bf16, exact = (elsewhere(generated, work, dtype) for dtype in ("bfloat16", "float32"))
    mine = elsewhere(served, work)
    result = {
        "benchmark": "agreement",
        "model": arguments.model.name,
        "prompts": work.count,
        "tokens": work.tokens,
        "snugfit_bf16_and_transformers_bf16": agreement(mine, bf16),
        "snugfit_bf16_and_transformers_float32": agreement(mine, exact),
        "transformers_bf16_and_float32": agreement(bf16, exact),
    }
    for name, value in result.items():
        print(f"measured: {name}: {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
