"""Tiny random models of several families, a byte-level tokenizer, and engines over both."""

from __future__ import annotations

import asyncio
import time
from contextlib import contextmanager

import pytest

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
