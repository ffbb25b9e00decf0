"""exporter/conversion/layouts.py against transformers itself: what it saves, loads, and calls old."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.conversion.layouts import (
    CHILDREN,
    LEGACY,
    PREFIXES,
    RENAMED,
    UNPREFIXED,
    rename,
    renamed,
)
from exporter.errors import UnknownLayout
from exporter.weights import Inputs, Plain, Stored
from loader.architectures import _ENCODER_DECODERS, _ENCODERS, causal_classes
from loader.files import read_header
from loader.headers import TensorInfo

SMALL = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1}
GPT = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
TEXT = {**SMALL, "head_dim": 8, "sliding_window": 16, "tie_word_embeddings": True}
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
MODELS = {
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "falcon": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "gpt2": GPT,
    "gpt_neox": SMALL,
    "granitemoe": MOE,
    "llama": SMALL,
    "mamba": {"vocab_size": 32, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2},
    "mixtral": MOE,
    "nemotron_h": {
        **SMALL, "head_dim": 8, "mamba_num_heads": 2, "mamba_head_dim": 16, "ssm_state_size": 4,
        "n_groups": 1, "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8,
        "moe_shared_expert_intermediate_size": 8,
    },
    "opt": {
        "vocab_size": 32, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "word_embed_proj_dim": 16, "max_position_embeddings": 32,
    },
    "phimoe": MOE,
}  # fmt: skip
# What older transformers saved besides, in the names of the model without its head.
COMPUTED = {
    "gpt2": {"h.0.attn.bias": (1, 1, 32, 32), "h.1.attn.masked_bias": ()},
    "gpt_neox": {
        "layers.0.attention.bias": (1, 1, 8, 8), "layers.0.attention.masked_bias": (),
        "layers.1.attention.rotary_emb.inv_freq": (2,),
    },
    "llama": {"layers.0.self_attn.rotary_emb.inv_freq": (4,), "layers.1.self_attn.rotary_emb.inv_freq": (4,)},
}  # fmt: skip
# Renamed by transformers 5, and left alone here: their files keep the hub's names, and an adapter's target in
# the few modules that are called otherwise in memory is refused by name.
LEFT_ALONE = {
    "aria_text", "axk1", "axk2", "bailing_hybrid", "deepseek_v4", "emu3", "ernie4_5_moe", "exaone_moe",
    "flint", "fuyu", "gemma4_unified", "hrm_text", "hy_v3", "hy_v4", "inkling2_text", "kimi_linear",
    "kolibri1", "laguna", "lfm3", "mimo_v2_flash", "mllama", "olmo_hybrid",
}  # fmt: skip


def plain(name, shape=(4,), folder=None):
    return Plain(name, Stored(TensorInfo(name, "F32", shape, "model.safetensors", 0, 0), folder))


def names_of(names, model_type, **config):
    return [w.name for w in renamed([plain(name) for name in names], {"model_type": model_type, **config})[0]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """model_type -> (model, folder of it, folder of it without its head; both saved by transformers)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = {}

    def make(model_type):
        if model_type not in made:
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **MODELS[model_type]))
            folder = tmp_path_factory.mktemp(model_type)
            model.save_pretrained(folder / "whole")
            model.base_model.save_pretrained(folder / "base")
            made[model_type] = model, folder / "whole", folder / "base"
        return made[model_type]

    return make


def saved(folder):
    return [Plain(info.name, Stored(info, folder)) for info in read_header(folder / "model.safetensors")]


# What transformers saves


@pytest.mark.parametrize("model_type", MODELS)
def test_the_names_that_transformers_saves_stay(tiny, model_type):
    weights = saved(tiny(model_type)[1])
    kept, dropped = renamed(weights, {"model_type": model_type})
    assert kept == weights
    assert dropped == []


@pytest.mark.parametrize("model_type", MODELS)
def test_the_names_that_modules_have_become_those_that_transformers_saves(tiny, model_type):
    model, whole, _ = tiny(model_type)
    written = {weight.name for weight in saved(whole)}
    stacked = re.compile(
        r".*experts\.(gate_up_proj|up_proj|down_proj)"
    )  # split when saved, but for granite's
    aliases = set(model.all_tied_weights_keys)
    for name in model.state_dict():
        if name not in aliases and (model_type == "granitemoe" or not stacked.fullmatch(name)):
            assert rename(name, {"model_type": model_type}) in without_vision_part(written), name


def without_vision_part(written):
    # `vision_model` in gemma3's tower comes and goes with the checkpoint; adapters to it are not looked for.
    return written | {name.replace("vision_tower.vision_model.", "vision_tower.") for name in written}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_model_saved_without_its_head_gets_the_whole_models_names(tiny, model_type):
    _, whole, base = tiny(model_type)
    written = {weight.name for weight in saved(whole)}
    kept, _ = renamed(saved(base), {"model_type": model_type})
    heads = written - {weight.name for weight in kept}
    assert len(kept) == len(saved(base))
    assert heads <= {"lm_head.weight", "lm_head.bias", "embed_out.weight"}
    assert {weight.name for weight in kept} <= written


@pytest.mark.parametrize("model_type", COMPUTED)
def test_an_old_checkpoint_loads_with_nothing_missing_and_nothing_left_over(tiny, tmp_path, model_type):
    from transformers import AutoModelForCausalLM

    model, whole, base = tiny(model_type)
    old = load_file(base / "model.safetensors")
    old |= {name: torch.zeros(shape) for name, shape in COMPUTED[model_type].items()}
    old |= {name: value for name, value in model.state_dict().items() if name == "lm_head.weight"}
    save_file(
        {name: value.contiguous().clone() for name, value in old.items()}, tmp_path / "model.safetensors"
    )
    kept, dropped = renamed(saved(tmp_path), {"model_type": model_type})
    out = tmp_path / "out"
    out.mkdir()
    with Inputs() as inputs:
        tensors = {w.name: inputs.tensor(w.tensor) for w in kept}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    model.config.save_pretrained(out)
    again, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert sorted(dropped) == sorted(COMPUTED[model_type])
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    assert {w.name for w in kept} >= {w.name for w in saved(whole)}


# What transformers calls old


def test_the_legacy_names_are_transformers_own():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import apply_renamings

    theirs = get_checkpoint_conversion_mapping("legacy")
    assert sum(len(rule.source_patterns) for rule in theirs) == len(LEGACY) + 1  # two stand in one here
    for name in (
        "bert.LayerNorm.gamma", "x.LayerNorm.beta", "conv.weight_g", "conv.weight_v", "conv.weight_gate",
        "model.language_model.model.layers.0.mlp.up_proj.weight", "language_model.model.model.norm.weight",
        "language_model.model.layers.0.mlp.up_proj.weight", "model.language_model.modelling.weight",
        "act_fn.beta",
    ):  # fmt: skip
        assert rename(name, {"model_type": "bert"}) == apply_renamings(name, theirs), name


def test_every_causal_family_that_transformers_renames_is_in_the_table_or_known_to_be_left_alone():
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renaming = set()
    for model_type, name in causal_classes().items():
        if model_type in _ENCODERS | _ENCODER_DECODERS:
            continue
        mapping = get_checkpoint_conversion_mapping(name) or get_checkpoint_conversion_mapping(model_type)
        if any(isinstance(rule, WeightRenaming) for rule in mapping or ()):
            renaming.add(model_type)
    assert renaming - RENAMED.keys() == LEFT_ALONE


@pytest.mark.parametrize(
    ("family", "like"),
    [
        ("minimax", "mixtral"), ("minimax_m2", "mixtral"), ("granitemoeshared", "granitemoe"),
        ("granitemoehybrid", "granitemoe"), ("llava", "gemma3"), ("mistral3", "gemma3"),
        ("paligemma", "gemma3"),
    ],
)  # fmt: skip
def test_families_with_the_same_rules_here_have_them_in_transformers(family, like):
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    def rules(model_type):
        mapping = get_checkpoint_conversion_mapping(model_type)
        return {(*rule.source_patterns, *rule.target_patterns) for rule in mapping}

    assert rules(like) <= rules(family)
    assert RENAMED[like] == RENAMED[family]


def test_the_prefixes_are_those_of_transformers_classes():
    import transformers

    models = Path(transformers.__file__).parent / "models"
    checked = 0
    for model_type in causal_classes():
        module = model_type.replace("-", "_")
        file = models / module / f"modeling_{module}.py"
        skipped = model_type in _ENCODERS | _ENCODER_DECODERS | UNPREFIXED
        found = set() if skipped or not file.is_file() else set(_prefixes(file))
        if len(found) == 1 and found <= CHILDREN.keys():
            assert PREFIXES.get(model_type, "model") == found.pop(), model_type
            checked += 1
    assert checked > 80


def _prefixes(file):
    return re.findall(r'base_model_prefix = "([^"]+)"', file.read_text(encoding="utf-8"))


# Rules of our own


@pytest.mark.parametrize(
    ("model_type", "before", "after"),
    [
        ("llama", "layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("llama", "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        ("gpt2", "wte.weight", "transformer.wte.weight"),
        ("qwen", "h.0.attn.c_attn.weight", "transformer.h.0.attn.c_attn.weight"),
        ("opt", "decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"),
        ("modernbert-decoder", "decoder.bias", "decoder.bias"),
        ("deepseek_v4", "layers.0.attn.wq_a.weight", "layers.0.attn.wq_a.weight"),
        ("mixtral", "model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"),
        (
            "qwen3_moe",
            "model.layers.0.mlp.experts.1.up_proj.weight",
            "model.layers.0.mlp.experts.1.up_proj.weight",
        ),
        ("gemma3", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("gemma3", "model.language_model.model.norm.weight", "language_model.model.norm.weight"),
        ("llava", "lm_head.weight", "language_model.lm_head.weight"),
        ("qwen2_5_vl", "model.language_model.norm.weight", "model.norm.weight"),
        ("qwen3_5", "model.norm.weight", "model.language_model.norm.weight"),
        ("qwen3_5", "model.visual.merger.norm.weight", "model.visual.merger.norm.weight"),
        ("qwen3_5_text", "model.language_model.norm.weight", "model.norm.weight"),
        ("unheard-of", "model.layers.0.weight", "model.layers.0.weight"),
        ("unheard-of", "transformer.h.0.weight", "transformer.h.0.weight"),
    ],
)
def test_a_name_is_the_one_in_files(model_type, before, after):
    assert names_of([before], model_type) == [after]
    assert rename(after, {"model_type": model_type}) == after


def test_a_bias_that_is_learned_is_no_mask():
    weights = [plain("transformer.h.0.attn.c_attn.bias"), plain("transformer.h.0.attn.bias", (12,))]
    assert renamed(weights, {"model_type": "gpt2"}) == (weights, [])


def test_what_is_computed_is_named_as_the_base_has_it():
    weights = [plain("h.0.attn.bias", (1, 1, 8, 8)), plain("h.0.ln_1.weight"), plain("rotary_emb.inv_freq")]
    kept, dropped = renamed(weights, {"model_type": "gpt2"})
    assert [weight.name for weight in kept] == ["transformer.h.0.ln_1.weight"]
    assert dropped == ["h.0.attn.bias", "rotary_emb.inv_freq"]


def test_a_renamed_weight_is_read_from_where_it_was():
    weight = plain("norm.weight")
    (kept,) = renamed([weight], {"model_type": "llama"})[0]
    assert kept.name == "model.norm.weight"
    assert kept.stored == weight.stored


def test_two_tensors_that_would_get_one_name_are_refused():
    with pytest.raises(
        UnknownLayout, match=r"^wte\.weight: the base also has .* transformer\.wte\.weight"
    ) as caught:
        names_of(["transformer.wte.weight", "wte.weight"], "gpt2")
    assert caught.value.exit_code == 42
