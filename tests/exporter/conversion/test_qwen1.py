"""exporter/conversion/qwen1.py: the logits of Qwen v1, out of a Qwen2 that transformers loads.

transformers has no Qwen v1. The oracle is `qwen1_logits` below, written from what its modeling_qwen.py does.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from exporter.conversion.qwen1 import convert, generation_config, is_qwen1
from exporter.errors import UnknownLayout
from exporter.recipe import Recipe
from exporter.weights import Inputs, Plain, Stored, matrix
from loader.files import read_header

CONFIG = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": 32, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "kv_channels": 8, "vocab_size": 64, "seq_length": 128,
    "layer_norm_epsilon": 1e-3, "rotary_emb_base": 500, "rotary_pct": 1.0, "no_bias": True, "bf16": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "tie_word_embeddings": False,
    "use_dynamic_ntk": True, "use_logn_attn": True, "max_position_embeddings": 8192,
}  # fmt: skip
C_ATTN = "transformer.h.1.attn.c_attn"


def qwen1_tensors(config=CONFIG):
    generator = torch.Generator().manual_seed(3)
    hidden, inner = config["hidden_size"], config["intermediate_size"] // 2

    def new(*shape):
        return torch.randn(shape, generator=generator) / 4

    tensors = {"transformer.wte.weight": new(64, hidden), "lm_head.weight": new(64, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.h.{layer}"
        tensors |= {
            f"{at}.ln_1.weight": 1 + new(hidden), f"{at}.ln_2.weight": 1 + new(hidden),
            f"{at}.attn.c_attn.weight": new(3 * hidden, hidden), f"{at}.attn.c_attn.bias": new(3 * hidden),
            f"{at}.attn.c_proj.weight": new(hidden, hidden), f"{at}.mlp.w1.weight": new(inner, hidden),
            f"{at}.mlp.w2.weight": new(inner, hidden), f"{at}.mlp.c_proj.weight": new(hidden, inner),
        }  # fmt: skip
    return tensors | {"transformer.ln_f.weight": 1 + new(hidden)}


# The oracle


def qwen1_logits(tensors, ids, config=CONFIG):
    """Qwen v1 in fp32 on one text, not longer than seq_length."""
    x = tensors["transformer.wte.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.h.{layer}"
        x = x + attention(tensors, f"{at}.attn", norm(x, tensors[f"{at}.ln_1.weight"], config), config)
        y = norm(x, tensors[f"{at}.ln_2.weight"], config)
        inner = linear(y, tensors[f"{at}.mlp.w1.weight"]) * silu(linear(y, tensors[f"{at}.mlp.w2.weight"]))
        x = x + linear(inner, tensors[f"{at}.mlp.c_proj.weight"])
    return linear(norm(x, tensors["transformer.ln_f.weight"], config), tensors["lm_head.weight"])


def norm(x, weight, config):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config["layer_norm_epsilon"]) * weight


def attention(tensors, at, x, config):
    mixed = linear(x, tensors[f"{at}.c_attn.weight"], tensors[f"{at}.c_attn.bias"])
    query, key, value = (
        part.unflatten(-1, (config["num_attention_heads"], -1)).transpose(0, 1) for part in mixed.chunk(3, -1)
    )
    query, key = rotated(query, config), rotated(key, config)
    out = scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
    return linear(out.transpose(0, 1).flatten(1), tensors[f"{at}.c_proj.weight"])


def rotated(heads, config):
    """[heads, length, width]: each half of a head is the other's partner."""
    width = heads.shape[-1]
    frequencies = config["rotary_emb_base"] ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(heads.shape[1]), frequencies)
    first, second = heads.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


# The driver


@dataclass(frozen=True)
class LowRank:
    """An update as an adapter's reader makes it: A as it is, B read from `first_row` on."""

    a: torch.Tensor
    b: torch.Tensor
    first_row: int = 0
    adapter: str = "my-adapter"
    stored: tuple = ()

    def open(self, inputs, before):
        def change(start, rows):
            first = self.first_row + start
            return rows + self.b[first : first + len(rows)] @ self.a

        return change


def recipes_of(folder, tensors, updates=()):
    save_file(tensors, folder / "model.safetensors")
    infos = {info.name: info for info in read_header(folder / "model.safetensors")}
    changes = dict(updates)
    return [
        Recipe(
            name, infos[name].shape, Plain(name, Stored(infos[name], folder)), updates=changes.get(name, ())
        )
        for name in tensors
    ]


def made(recipe, inputs):
    """The tensor, in two blocks of rows."""
    rows = matrix(recipe.shape)[0]
    read = recipe.base.open(inputs)
    changes = [update.open(inputs, read) for update in recipe.updates]
    blocks = []
    for start, stop in ((0, rows // 2), (rows // 2, rows)):
        block = read(recipe.first_row + start, recipe.first_row + stop).clone()
        for change in changes:
            block = change(start, block)
        blocks.append(block)
    return torch.cat(blocks).reshape(recipe.shape)


def qwen2(folder, recipes, config):
    """What transformers loads, after the export; it says of no tensor that it is missing or unexpected."""
    from transformers import AutoModelForCausalLM

    out = folder / "out"
    out.mkdir()
    with Inputs() as inputs:
        save_file({r.name: made(r, inputs) for r in recipes}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


IDS = torch.randint(64, (100,), generator=torch.Generator().manual_seed(4))


# Values


@torch.inference_mode()
def test_the_qwen2_computes_the_logits_of_the_qwen_v1(tmp_path):
    tensors = qwen1_tensors()
    recipes, config, must_be_zero = convert(recipes_of(tmp_path, tensors), CONFIG)
    logits = qwen2(tmp_path, recipes, config)(IDS[None]).logits[0]
    assert must_be_zero == []
    torch.testing.assert_close(logits, qwen1_logits(tensors, IDS), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_lora_on_the_fused_matrix_lands_in_q_k_and_v(tmp_path):
    tensors = qwen1_tensors()
    generator = torch.Generator().manual_seed(5)
    on_weight = LowRank(
        torch.randn(3, 32, generator=generator) / 3, torch.randn(96, 3, generator=generator) / 3
    )
    on_bias = LowRank(torch.ones(1, 1), torch.randn(96, 1, generator=generator))
    updates = {f"{C_ATTN}.weight": (on_weight,), f"{C_ATTN}.bias": (on_bias,)}
    recipes, config, _ = convert(recipes_of(tmp_path, tensors, updates), CONFIG)
    logits = qwen2(tmp_path, recipes, config)(IDS[None]).logits[0]
    before = qwen1_logits(tensors, IDS)
    tensors[f"{C_ATTN}.weight"] += on_weight.b @ on_weight.a
    tensors[f"{C_ATTN}.bias"] += on_bias.b[:, 0]
    expected = qwen1_logits(tensors, IDS)
    assert (expected - before).abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_slice_of_a_slice_and_of_its_updates_starts_where_both_say(tmp_path):
    tensors = qwen1_tensors()
    recipes = recipes_of(tmp_path, tensors)
    at = next(i for i, recipe in enumerate(recipes) if recipe.name == f"{C_ATTN}.weight")
    update = LowRank(torch.zeros(1, 32), torch.zeros(106, 1), first_row=10)
    base = recipes[at].base
    recipes[at] = Recipe(recipes[at].name, recipes[at].shape, base, 5, (update,), trained_on=base)
    found = {r.name: r for r in convert(recipes, CONFIG)[0] if r.base is base}
    assert [(r.first_row, r.updates[0].first_row) for r in found.values()] == [(5, 10), (37, 42), (69, 74)]
    assert [name.split(".")[4] for name in found] == ["q_proj", "k_proj", "v_proj"]
    assert all(r.shape == (32, 32) and r.trained_on is base for r in found.values())


def test_tied_embeddings_have_no_head(tmp_path):
    tensors = qwen1_tensors()
    head = tensors.pop("lm_head.weight")
    recipes, config, _ = convert(recipes_of(tmp_path, tensors), CONFIG | {"tie_word_embeddings": True})
    assert config["tie_word_embeddings"] is True
    assert head.shape == (64, 32)
    assert "lm_head.weight" not in {recipe.name for recipe in recipes}


def test_biases_that_gptq_adds_are_given_back_to_be_checked(tmp_path):
    phantoms = {
        f"transformer.h.{layer}.{name}.bias": torch.zeros(32)
        for layer in (0, 1)
        for name in ("attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    }
    recipes, _, must_be_zero = convert(recipes_of(tmp_path, qwen1_tensors() | phantoms), CONFIG)
    assert [weight.name for weight in must_be_zero] == list(phantoms)
    assert not any(recipe.name.endswith("o_proj.bias") for recipe in recipes)


# config.json


def test_the_config_is_one_that_transformers_reads_as_qwen2(tmp_path):
    from transformers import AutoConfig

    _, made_config, _ = convert(recipes_of(tmp_path, qwen1_tensors()), CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(made_config))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "Qwen2Config"
    assert config.architectures == ["Qwen2ForCausalLM"]
    assert config.intermediate_size == 48
    assert config.num_key_value_heads == 4
    assert config.rms_norm_eps == 1e-3
    assert config.rope_parameters["rope_theta"] == 500
    assert config.max_position_embeddings == 128
    assert config.dtype == torch.bfloat16
    assert (config.bos_token_id, config.eos_token_id) == (151_643, 151_643)
    assert "auto_map" not in made_config


def test_a_resized_vocabulary_is_that_of_the_embedding(tmp_path):
    tensors = qwen1_tensors()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tensors[name] = torch.zeros(80, 32)
    assert convert(recipes_of(tmp_path, tensors), CONFIG)[1]["vocab_size"] == 80


@pytest.mark.parametrize(
    ("config", "is_one"),
    [
        (CONFIG, True),
        ({"model_type": "qwen"}, True),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, False),
        ({"model_type": "qwen", "architectures": ["SomethingElse"]}, False),
        ({}, False),
    ],
)
def test_qwen_v1_is_known_by_its_config(config, is_one):
    assert is_qwen1(config) is is_one


# generation_config.json


def test_what_a_chat_model_stops_at_becomes_its_end_of_text():
    from transformers import GenerationConfig

    v1 = {
        "chat_format": "chatml", "do_sample": True, "eos_token_id": 151643, "max_new_tokens": 512,
        "max_window_size": 6144, "pad_token_id": 151643, "repetition_penalty": 1.1, "top_k": 0, "top_p": 0.8,
    }  # fmt: skip
    output = generation_config(v1)
    assert output == {
        "do_sample": True, "eos_token_id": [151645, 151643], "max_new_tokens": 512, "pad_token_id": 151643,
        "repetition_penalty": 1.1, "top_k": 0, "top_p": 0.8,
    }  # fmt: skip
    GenerationConfig(**output).validate(strict=True)


def test_a_base_model_stops_at_its_stop_words_and_the_end_of_text():
    v1 = {
        "chat_format": "raw",
        "eos_token_id": 151643,
        "stop_words_ids": [[151643], [33975, 25]],
        "top_p": 0.8,
    }
    assert generation_config(v1) == {"eos_token_id": [151643], "pad_token_id": 151643, "top_p": 0.8}


def test_without_a_generation_config_a_turn_still_ends():
    assert generation_config({}) == {"eos_token_id": [151645, 151643], "pad_token_id": 151643}


# Refused


def refusal(folder, tensors, config=CONFIG, updates=()):
    with pytest.raises(UnknownLayout) as caught:
        convert(recipes_of(folder, tensors, updates), config)
    assert caught.value.exit_code == 42
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("transformer.visual.conv1.weight", "this is Qwen-VL"),
        ("transformer.audio.conv1.weight", "this is Qwen-Audio"),
        ("transformer.h.0.attn.q_norm.weight", "no such tensor"),
        ("score.weight", "no such tensor"),
        ("transformer.h.2.ln_1.weight", "2 layers"),
    ],
)
def test_a_tensor_that_qwen_v1_lacks_is_refused_by_name(tmp_path, name, words):
    message = refusal(tmp_path, qwen1_tensors() | {name: torch.zeros(32)})
    assert words in message
    assert message.startswith((name, "model.layers.2.input_layernorm.weight"))


@pytest.mark.parametrize(
    "name", ["transformer.ln_f.weight", "transformer.h.1.mlp.w2.weight", "lm_head.weight"]
)
def test_a_base_that_lacks_a_tensor_is_refused(tmp_path, name):
    tensors = qwen1_tensors()
    del tensors[name]
    assert "1 tensors of this Qwen2 are not made" in refusal(tmp_path, tensors)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("transformer.h.0.mlp.w1.weight", (56, 32), "[56, 32], and config.json says [48, 32]"),
        ("transformer.h.0.mlp.c_proj.weight", (32, 56), "[32, 56], and config.json says [32, 48]"),
        ("transformer.h.1.attn.c_attn.weight", (94, 32), "94 rows"),
        ("transformer.h.1.attn.c_attn.weight", (93, 32), "[31, 32], and config.json says [32, 32]"),
        ("lm_head.weight", (65, 32), "[65, 32], and config.json says [64, 32]"),
    ],
)
def test_shapes_that_the_config_does_not_say_are_refused_with_both(tmp_path, name, shape, words):
    assert words in refusal(tmp_path, qwen1_tensors() | {name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_channels": 16}, "4 heads of 16 are not 32"),
        ({"rotary_pct": 0.5}, "rotary_pct is 0.5"),
        ({"seq_length": None}, "seq_length is None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
    ],
)
def test_a_config_that_qwen2_cannot_express_is_refused(tmp_path, change, words):
    assert words in refusal(tmp_path, qwen1_tensors(), CONFIG | change)


def test_an_adapter_on_a_bias_that_qwen2_lacks_is_refused(tmp_path):
    name = "transformer.h.0.mlp.w1.bias"
    update = LowRank(torch.zeros(1, 1), torch.zeros(48, 1))
    message = refusal(tmp_path, qwen1_tensors() | {name: torch.zeros(48)}, updates={name: (update,)})
    assert name in message
    assert "my-adapter" in message


def test_the_oracle_sees_the_halves_of_the_mlp_swapped():
    tensors = qwen1_tensors()
    swapped = dict(tensors)
    for layer in (0, 1):
        one, two = (f"transformer.h.{layer}.mlp.w{number}.weight" for number in (1, 2))
        swapped[one], swapped[two] = tensors[two], tensors[one]
    assert (qwen1_logits(tensors, IDS) - qwen1_logits(swapped, IDS)).abs().max() > 0.1
