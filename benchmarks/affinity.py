"""Prefix reuse across replicas: python -m benchmarks.affinity [PLAN.json] [--replicas 4] [--conversations 40]

Conversations of several turns, each with all that was said before, on replicas of benchmarks.paced behind a
real nginx: what is left of prefix reuse when turns are spread at random or to whoever has least to do, and
when the proxy sends a conversation where it was before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.client import Sample, ask, connect, letters, quantile
from benchmarks.paced import GPU, MODEL, add_card, body, paced, plan_for
from benchmarks.proxy import Nginx
from benchmarks.rolling import ms, replicas
from deployment.capacity import Fit

TURN_TOKENS, ANSWER_TOKENS, TURNS = 300, 64, 5


async def converse(url: str, number: int, rng: random.Random) -> list[Sample]:
    """One conversation, each turn after the answer to the last one."""
    said: list[dict[str, str]] = []
    samples: list[Sample] = []
    async with connect(url) as client:
        client.headers["x-conversation"] = str(number)
        await asyncio.sleep(rng.uniform(0, 10))
        for _ in range(TURNS):
            prompt = letters(rng, TURN_TOKENS)
            samples.append(await ask(client, body(prompt, ANSWER_TOKENS, said)))
            said += [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": "a" * ANSWER_TOKENS},  # what the paced model says
            ]
            await asyncio.sleep(rng.uniform(0, 1))
    return samples


def reuse_expected(count: int, block_tokens: int, kept: bool) -> float:
    """Share of the prompts' tokens that are found: whole blocks of the last turn on the same replica."""
    turn = TURN_TOKENS + ANSWER_TOKENS
    asked = found = 0.0
    for number in range(TURNS):
        prompt = number * turn + TURN_TOKENS
        asked += prompt
        for back in range(1, number + 1):
            share = float(back == 1) if kept else (1 - 1 / count) ** (back - 1) / count
            found += share * ((number - back + 1) * turn // block_tokens * block_tokens)
    return found / asked


def measure(balance: str, plan: Path, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    with ExitStack() as opened:
        start = paced(plan, arguments, folder / "log")
        running = opened.enter_context(replicas(start, arguments.replicas))
        proxy = opened.enter_context(Nginx(folder, [replica.port for replica in running], balance))
        samples = asyncio.run(conversations(proxy.url, arguments.conversations))
        queried = sum(replica.metric("snugfit_prefix_cache_queried_tokens_total") for replica in running)
        found = sum(replica.metric("snugfit_prefix_cache_hit_tokens_total") for replica in running)
    firsts = [sample.first for sample in samples]
    p50, p99 = (ms(quantile(firsts, share)) for share in (0.5, 0.99))
    return {"balance": balance, "reused": round(found / queried, 3), "ttft_ms": {"p50": p50, "p99": p99}}


async def conversations(url: str, count: int) -> list[Sample]:
    talks = [converse(url, number, random.Random(number)) for number in range(count)]
    return [sample for samples in await asyncio.gather(*talks) for sample in samples]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, nargs="?", help="what `snugfit plan --json` printed")
    parser.add_argument("--replicas", type=int, default=4)
    parser.add_argument("--conversations", type=int, default=40)
    add_card(parser)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plan = arguments.plan or plan_for(32, folder)
        block_tokens = Fit.of(json.loads(plan.read_text())).block_tokens
        for balance in ("random", "least", "conversation"):
            guess = reuse_expected(arguments.replicas, block_tokens, balance == "conversation")
            print(f"predicted: {balance}: {guess:.0%} of the prompts' tokens are found", flush=True)
            rows.append({"predicted": round(guess, 3), **measure(balance, plan, arguments, folder)})
            print(f"measured:  {json.dumps(rows[-1])}", flush=True)
    result: dict[str, Any] = {"benchmark": "affinity", "model": MODEL, "gpu": GPU}
    result |= {name: getattr(arguments, name) for name in ("replicas", "conversations", "read", "tflops")}
    result |= {"turns": TURNS, "turn_tokens": TURN_TOKENS, "answer_tokens": ANSWER_TOKENS, "rows": rows}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
