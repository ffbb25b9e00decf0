"""loader/batching.py: which models share a step, and what is said of the others."""

import subprocess
import sys

import pytest
from transformers import AutoConfig

from loader.batching import why_one_at_a_time
from loader.checkpoint import ModelSpec
from loader.families import FAMILIES
from loader.shape import describe

SIZES = {
    "vocab_size": 72, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
}  # fmt: skip


def reason(model_type, context=1024, **config):
    spec = ModelSpec("m", None, {**SIZES, "model_type": model_type, **config}, ())
    return why_one_at_a_time(spec, describe(spec), context)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"lfm2"}))
def test_families_of_full_and_sliding_attention_are_batched(family):
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
    assert reason(family, sliding_window=64, layer_types=["full_attention", "sliding_attention"] * 2) is None
    assert reason(family, **experts) is None


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"lfm2"}))
def test_the_config_that_transformers_writes_for_a_family_is_batched(family):
    spec = ModelSpec("m", None, AutoConfig.for_model(family).to_dict(), ())
    assert why_one_at_a_time(spec, describe(spec), 1024) is None


@pytest.mark.parametrize("family", ["olmo2", "olmo3", "glm4", "qwen2_moe", "cohere", "gpt_neox", "ministral"])
def test_an_unlisted_family_whose_attention_is_exchangeable_is_batched(family):
    assert reason(family) is None


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3}, "convolution layers"),
        ("qwen3_next", {"layer_types": ["linear_attention", "full_attention"] * 2,
                        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                        "linear_num_key_heads": 2}, "has linear-attention layers"),
        ("deepseek_v3", {"kv_lora_rank": 16}, "compresses keys and values (MLA)"),
        ("deepseek_v3", {}, "compresses keys and values (MLA)"),
        ("llama", {"layer_types": ["full_attention", "chunked_attention"] * 2}, "kind (chunked_attention)"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "not causal"),
        ("gpt_oss", {}, "has attention sinks"),
        ("gemma3n", {}, "between layers"),
        ("llama4", {}, "in fixed chunks"),
        ("mamba2", {}, "has no exchangeable attention"),
        ("falcon", {}, "has no exchangeable attention"),
        ("jetmoe", {}, "of a kind of its own"),
        ("gpt2", {}, "not causal"),
        ("gemma3", {"text_config": {**SIZES, "model_type": "gemma3_text"}}, "text part of a larger model"),
        ("qwen2_moe", {"sliding_window": 64}, "which of its layers have the window"),
        ("no_such_family", {}, "has no exchangeable attention"),
        ("../models/llama", {}, "has no exchangeable attention"),
    ],
)  # fmt: skip
def test_what_blocks_of_keys_and_values_do_not_hold_runs_one_at_a_time(family, config, words):
    assert words in (reason(family, **config) or "")


LONG = {"rope_type": "longrope", "original_max_position_embeddings": 4096}


def test_positions_that_depend_on_the_longest_of_a_batch_keep_long_requests_apart():
    assert reason("phi3", 4096, rope_parameters=LONG) is None
    said = reason("phi3", 4097, rope_parameters=LONG)
    assert said == "has other positions beyond 4,096 tokens (--context 4096 or less runs requests together)"
    old = {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 4096}
    assert reason("phi3", 4097, **old) == said
    assert "positions" in reason("phi3", 100, rope_scaling={"type": "longrope"})
    assert reason("llama", 8192, rope_parameters={"rope_type": "llama3"}) is None


def test_nothing_is_imported_to_find_out():
    code = f"""
import sys
from loader.batching import why_one_at_a_time
from loader.checkpoint import ModelSpec
from loader.shape import describe
spec = ModelSpec("m", None, {dict(SIZES, model_type="olmo2")!r}, ())
print(why_one_at_a_time(spec, describe(spec), 10), {{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "set()"]
