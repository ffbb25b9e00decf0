"""Greedy answers against transformers.generate: 200 prompts of mixed length, served at the same time.

In float32, so that a token can only differ when something is wrong: a mask, a position, a block.
"""

import asyncio
import itertools
import random
from dataclasses import replace

import pytest
import torch

from loader.kv_layout import KvGroup, KvLayout
from service.engine.runner import Runner
from service.engine.types import Request, SamplingParams

FAMILIES = ("qwen2", "llama", "mistral", "gemma3_text", "qwen3_moe")
PROMPTS, CONTEXT, CHUNK, ROWS, BLOCK = 200, 96, 48, 16, 4


def prompts():
    """(ids, tokens to generate): stems that many share, with ends of their own, some twice; and short ones
    whose answers are longer, which run out of blocks where windows are small, too."""
    rng = random.Random(5)
    stems = [[rng.randrange(2, 300) for _ in range(rng.randrange(1, 40))] for _ in range(25)]
    made = []
    for _ in range(PROMPTS - 70):
        end = [rng.randrange(2, 300) for _ in range(rng.randrange(0, 30))]
        made.append((rng.choice(stems) + end, rng.randrange(1, 12)))
    for _ in range(60):
        made.append(([rng.randrange(2, 300) for _ in range(rng.randrange(1, 4))], 16))
    return made + made[:10]


@pytest.fixture(scope="module")
def expected(tiny):
    """`expected(family)`: the tokens that generate gives for each prompt."""
    known = {}

    def answers(family):
        if family not in known:
            with torch.inference_mode():
                known[family] = [_generated(tiny(family), *prompt) for prompt in prompts()]
        return known[family]

    return answers


def _generated(model, ids, count):
    output = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=count, do_sample=False
    )
    return output[0, len(ids) :].tolist()


def layout(config, sequences, spare=0):
    """Blocks for so many whole contexts, and some more."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        windows = [window if config.model_type == "mistral" else None] * config.num_hidden_layers
    else:
        windows = [window if kind == "sliding_attention" else None for kind in kinds]
    groups = []
    for seen in sorted(set(windows), key=lambda w: w is not None):
        group = KvGroup(seen, tuple(at for at, w in enumerate(windows) if w == seen), 0)
        blocks = sequences * group.blocks_for(CONTEXT, CHUNK, BLOCK) + spare
        groups.append(replace(group, blocks=blocks))
    return KvLayout(BLOCK, tuple(groups))


async def served(engine, asked):
    async def one(number, ids, count):
        params = SamplingParams(max_tokens=count, temperature=0.0)
        return [event.token_id async for event in engine.generate(Request(str(number), tuple(ids), params))]

    return await asyncio.gather(*(one(at, *prompt) for at, prompt in enumerate(asked)))


def out_of_memory_at_times(runner):
    """No memory for every 40th step, in between enough for larger and larger ones."""
    step, steps = runner.step, itertools.count(1)

    def may_fail(rows, meanwhile):
        if next(steps) % 40 == 0 and sum(len(row.ids) for row in rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(rows, meanwhile)

    runner.step = may_fail


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("reuse", "sequences", "failing"),
    [(True, 8, False), (False, 8, False), (True, 1, False), (False, 1, True)],
    ids=["with prefix reuse", "without", "with preemption", "without, out of memory at times"],
)
def test_200_prompts_at_once_get_the_tokens_of_generate(
    tiny, expected, engine_over, family, reuse, sequences, failing
):
    model = tiny(family)
    runner = Runner(model, "cpu", CONTEXT, ROWS, CHUNK, layout(model.config, sequences, spare=4))
    runner.prefix_reuse = reuse
    if failing:
        out_of_memory_at_times(runner)
    with engine_over(runner, max_queue=PROMPTS) as engine:
        answers = asyncio.run(served(engine, prompts()))
        stats = engine.stats()
    assert answers == expected(family)
    assert (stats.prefix_hits > 0) == reuse
    assert (stats.preemptions > 0) == (sequences == 1)
    assert (stats.out_of_memory > 2) == failing
    assert stats.kv_blocks_used == 0
