"""Tiny random models of several families, a byte-level tokenizer, runners without a KV cache, and engines."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import contextmanager

import pytest

from loader.kv_layout import KvGroup, KvLayout

VOCAB = 300
DEADLINE_S = 20

_SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    "tie_word_embeddings": False,
}  # fmt: skip
_MORE = {
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 13},
    "gemma2": {"sliding_window": 9, "head_dim": 8},
    "gemma3_text": {
        "sliding_window": 9, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "conv_L_cache": 3},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"] * 2, "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
}  # fmt: skip
FAMILIES = tuple(_MORE)


@pytest.fixture(scope="session")
def tiny():
    """`tiny(family)`: a model in float32, made once; weights large enough that greedy choices differ."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def make(family="qwen2"):
        if family not in made:
            torch.manual_seed(7)
            config = AutoConfig.for_model(family, **_SMALL, **_MORE[family])
            config.initializer_range = 0.3
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            made[family] = model.eval()
        return made[family]

    return make


@pytest.fixture(scope="session")
def tokenizer():
    """Byte-level BPE trained on a little text: many characters take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<end>", "<pad>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(["the model answers, and the answer is 你好 😀"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


BLOCK = 4  # tokens


class ScriptedRunner:
    """Likes token 40 + (tokens so far) best, so that answers show what was computed. Steps only while `gate`
    is open; `fail(rows)` may raise. `steps` keeps (start, new ids) of each row of each step."""

    vocab = VOCAB
    prefix_reuse = one_state = False

    def __init__(self, concurrency=2, context=64, chunk_tokens=8, blocks=None, gate_open=True, fail=None):
        self.concurrency, self.context, self.chunk_tokens = concurrency, context, chunk_tokens
        blocks = blocks or concurrency * -(-context // BLOCK)
        self.layout = KvLayout(BLOCK, (KvGroup(None, (0,), blocks),))
        self.gate, self.fail = threading.Event(), fail or (lambda rows: None)
        self.steps, self.recovered, self.closed = [], 0, False
        if gate_open:
            self.gate.set()

    def step(self, rows, meanwhile=lambda: None):
        meanwhile()
        self.steps.append([(row.start, len(row.ids)) for row in rows])
        assert self.gate.wait(DEADLINE_S)
        assert len(rows) <= self.concurrency
        assert sum(len(row.ids) for row in rows) <= self.chunk_tokens
        self.fail(rows)
        return self.logits([row for row in rows if row.sample])

    def logits(self, rows):
        import torch

        likes = [40 + (row.start + len(row.ids)) % 200 for row in rows]
        return torch.eye(VOCAB)[likes]

    def recover(self):
        self.recovered += 1

    def close(self):
        self.closed = True


class RereadingRunner(ScriptedRunner):
    """Its pool holds token ids: each step reads its sequences back through their block tables, and what it
    likes, `checksum(ids)`, depends on all of them. An oracle for what the engine and the scheduler put into
    the tables."""

    prefix_reuse = True

    def __init__(self, **options):
        super().__init__(**options)
        self._ids = [[None] * BLOCK for _ in range(self.layout.groups[0].blocks)]

    @staticmethod
    def checksum(ids):
        return 2 + sum(at * token_id for at, token_id in enumerate(ids, start=1)) % (VOCAB - 2)

    def logits(self, rows):
        import torch

        return torch.eye(VOCAB)[[self.checksum(self._read_back(row)) for row in rows]]

    def step(self, rows, meanwhile=lambda: None):
        for row in rows:
            for at, token_id in enumerate(row.ids, start=row.start):
                self._ids[row.tables[0][at // BLOCK]][at % BLOCK] = token_id
        return super().step(rows, meanwhile)

    def _read_back(self, row):
        return [self._ids[row.tables[0][at // BLOCK]][at % BLOCK] for at in range(row.start + len(row.ids))]


@pytest.fixture
def scripted_runner():
    return ScriptedRunner


@pytest.fixture
def rereading_runner():
    return RereadingRunner


def until(condition, what="it"):
    """Poll with a deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in {DEADLINE_S} s"
        time.sleep(0.002)


@pytest.fixture(name="until")
def until_fixture():
    return until


@pytest.fixture
def within():
    """Run a coroutine under a deadline, so that what hangs fails."""

    def run(coroutine):
        async def limited():
            async with asyncio.timeout(DEADLINE_S):
                return await coroutine

        return asyncio.run(limited())

    return run


@pytest.fixture
def engine_over(tokenizer):
    """`with engine_over(runner) as engine`, closed at the end."""
    from service.engine.engine import StepEngine

    @contextmanager
    def start(runner, **options):
        engine = StepEngine(runner, tokenizer, **options)
        try:
            yield engine
        finally:
            engine.close()

    return start
