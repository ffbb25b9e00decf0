"""Attention over blocks, graphs and the engine on a real GPU."""

import asyncio
import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from loader.kv_layout import KvGroup, KvLayout
from service.engine.backends import TorchAttention, VarlenAttention
from service.engine.batch import Batcher
from service.engine.engine import StepEngine
from service.engine.pool import LayerStore
from service.engine.rows import Row
from service.engine.runner import Runner
from service.engine.types import Request, SamplingParams

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: what runs on a GPU is NOT tested"
)
BLOCK, CONTEXT, ROWS = 256, 1024, 16
SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip


def model(family, dtype, **more):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **SIZES, **more)
    config.initializer_range = 0.1
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval().to("cuda:0")


def runner(made, window=None, graphs=True):
    layout = KvLayout(BLOCK, (KvGroup(window, tuple(range(4)), 64),))
    over = Runner(made, "cuda:0", CONTEXT, ROWS, 512, layout)
    if not graphs:
        over._graphs = None
    over.rehearse()
    return over


def prompts(count):
    rng = random.Random(2)
    return [[rng.randrange(2048) for _ in range(rng.randrange(1, 700))] for _ in range(count)]


async def served(engine, asked, tokens, **params):
    async def one(name, ids):
        options = SamplingParams(max_tokens=tokens, **{"temperature": 0.0, **params})
        return [event.token_id async for event in engine.generate(Request(str(name), tuple(ids), options))]

    return await asyncio.gather(*(one(at, ids) for at, ids in enumerate(asked)))


def answers(made, asked, tokens=24, window=None, graphs=True, **params):
    tokenizer = AutoTokenizer.from_pretrained("service/demo")
    engine = StepEngine(runner(made, window, graphs), tokenizer, max_queue=len(asked))
    try:
        return asyncio.run(served(engine, asked, tokens, **params))
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("family", "more", "window"), [("qwen2", {}, None), ("mistral", {"sliding_window": 300}, 300)]
)
def test_float32_answers_are_those_of_generate(family, more, window):
    made, asked = model(family, torch.float32, **more), prompts(40)
    expected = []
    for ids in asked:
        given = torch.tensor([ids], device="cuda:0")
        out = made.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=24, do_sample=False)
        expected.append(out[0, len(ids) :].tolist())
    assert answers(made, asked, window=window) == expected


@pytest.mark.parametrize("heads", [8, 2], ids=["shared keys", "own keys"])
@pytest.mark.parametrize("window", [None, 300, 900])
@pytest.mark.parametrize("counts", [(1, 1, 1), (300, 1, 77)], ids=["single tokens", "mixed"])
def test_flash_attention_sees_what_torchs_does(window, counts, heads):
    device, shape = torch.device("cuda:0"), (17, BLOCK, 2, 64)
    layout = KvLayout(BLOCK, (KvGroup(window, (0,), 16),))
    keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in "kv")
    store = LayerStore(keys, values, 0, window, BLOCK)
    rows = [
        Row([0] * count, start, ([at, 15 - at, at + 3, 0],), True)
        for at, (count, start) in enumerate(zip(counts, (700, 511, 0), strict=True))
    ]
    batch = Batcher(layout, CONTEXT, ROWS, 512, device).build(rows).main
    query = torch.randn(sum(counts), heads, 64, device=device, dtype=torch.bfloat16)
    flash, plain = (
        kind(store).attend(query, batch, 0.125, None) for kind in (VarlenAttention, TorchAttention)
    )
    torch.testing.assert_close(flash, plain, rtol=2e-2, atol=2e-2)


def test_graphs_give_the_logits_of_the_same_step_without_them():
    made, ids = model("qwen2", torch.bfloat16), prompts(1)[0]
    over = runner(made)
    assert over._graphs is not None
    table = [0, 1, 2, 3]
    over.step([Row(ids, 0, (table,), True)])
    decode = [Row([7], len(ids), (table,), True)]
    recorded = over.step(decode).float().clone()
    over._graphs = None
    eager = over.step(decode).float()
    torch.testing.assert_close(recorded, eager, rtol=2e-2, atol=2e-2)


def test_a_seed_gives_one_text_beside_others():
    made, asked = model("qwen2", torch.float32), prompts(12)
    together = answers(made, asked, temperature=1.0, seed=5)
    assert answers(made, asked[3:4], temperature=1.0, seed=5)[0] == together[3]
