"""loader/families.py, and loader/shape.py that reads config.json by it, against transformers' own classes."""

from dataclasses import MISSING, fields

import pytest
from transformers import AutoConfig
from transformers.cache_utils import DynamicCache

from loader.checkpoint import ModelSpec
from loader.errors import UnsupportedModel
from loader.families import ESTIMATE, FAMILIES, FULL, LINEAR, SLIDING, family_of
from loader.shape import describe

DEFAULTS = [(name, key) for name, family in FAMILIES.items() for key in family.defaults]
# What every config.json states; the rest may be left to the class's defaults.
STATED = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
SIZES = {
    "vocab_size": 72, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 12,
    "num_attention_heads": 4, "num_key_value_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LAYER_TYPES = {
    "full_attention": FULL,
    "sliding_attention": SLIDING,
    "conv": LINEAR,
    "linear_attention": LINEAR,
}
CACHE_LAYERS = {
    "DynamicLayer": FULL, "DynamicSlidingWindowLayer": SLIDING, "LinearAttentionLayer": LINEAR,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
LAYERED = {
    "llama": ("llama", {}),
    "granite": ("granite", {}),
    "mistral": ("mistral", {}),
    "mistral with a window": ("mistral", {"sliding_window": 8}),
    "mistral without one": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 that has a window and does not use it": ("qwen2", {"sliding_window": 8}),
    "qwen2 with a window above layer 5": ("qwen2", {**WINDOW, "max_window_layers": 5}),
    "qwen2 with a window above its last layer": ("qwen2", WINDOW),
    "qwen3 with a window everywhere": ("qwen3", {**WINDOW, "max_window_layers": 0}),
    "smollm3": ("smollm3", {}),
    "smollm3 with a window": ("smollm3", WINDOW),
    "smollm3 with a window and rotary layers of its own": (
        "smollm3", {**WINDOW, "no_rope_layers": [1, 0, 0, 1] * 3},
    ),
    "smollm3 with no rotary positions in every third layer": (
        "smollm3", {**WINDOW, "no_rope_layer_interval": 3},
    ),
    "starcoder2": ("starcoder2", {}),
    "starcoder2 with a window": ("starcoder2", {"sliding_window": 8}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma3": ("gemma3_text", {}),
    "gemma3 with a pattern of four": ("gemma3_text", {"sliding_window_pattern": 4}),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "phi3 with a window": ("phi3", {"sliding_window": 8}),
    "mixtral": ("mixtral", {}),
    "mixtral with a window": ("mixtral", {"sliding_window": 8}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe with a window": ("qwen3_moe", WINDOW),
    "lfm2": ("lfm2", {"full_attn_idxs": [2, 5, 8, 10]}),
    "lfm2 of attention only": ("lfm2", {}),
}  # fmt: skip


def shape_of(config):
    return describe(ModelSpec("test", None, config, ()))


def of_transformers(model_type, key):
    """A class's default; rotary settings have moved into a dictionary of their own."""
    config = AutoConfig.for_model(model_type)
    if key == "partial_rotary_factor":
        return config.rope_parameters[key]
    field = next(field for field in fields(config) if field.name == key)
    return field.default if field.default_factory is MISSING else field.default_factory()


@pytest.mark.parametrize(("model_type", "key"), DEFAULTS)
def test_a_default_is_that_of_transformers_class(model_type, key):
    expected = of_transformers(model_type, key)
    if expected is None and key == "mlp_only_layers":  # what the class makes of it
        expected = getattr(AutoConfig.for_model(model_type), key)
    assert FAMILIES[model_type].defaults[key] == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_that_states_no_default_reads_as_one_that_states_them_all(model_type):
    full = AutoConfig.for_model(model_type).to_dict()
    assert shape_of({key: full[key] for key in STATED}) == shape_of(full)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_config_reads_as_it_was_written_to_disk(model_type):
    changed = {"num_hidden_layers": 6, "num_key_value_heads": 2, "num_attention_heads": 8, "hidden_size": 64}
    config = AutoConfig.for_model(model_type, **changed)
    assert shape_of(config.to_diff_dict()) == shape_of(config.to_dict())
    assert (shape_of(config.to_diff_dict()).kv_heads, shape_of(config.to_diff_dict()).heads) == (2, 8)


@pytest.mark.parametrize("model", LAYERED.values(), ids=LAYERED)
def test_layers_are_of_the_kinds_that_transformers_gives_them(model):
    """From a config.json as older versions wrote it, without a list of layer types, and from today's."""
    model_type, changes = model
    config = AutoConfig.for_model(model_type, **SIZES, **changes)
    if getattr(config, "layer_types", None):
        expected = tuple(LAYER_TYPES[name] for name in config.layer_types)
    else:
        expected = tuple(CACHE_LAYERS[type(layer).__name__] for layer in DynamicCache(config=config).layers)
    assert len(expected) == SIZES["num_hidden_layers"]
    assert shape_of({"model_type": model_type, **SIZES, **changes}).layer_kinds == expected
    assert shape_of(config.to_dict()).layer_kinds == expected


@pytest.mark.parametrize("model", LAYERED.values(), ids=LAYERED)
def test_the_window_is_the_one_that_transformers_cache_keeps(model):
    model_type, changes = model
    config = AutoConfig.for_model(model_type, **SIZES, **changes)
    windows = {getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers} - {
        None
    }
    shape = shape_of({"model_type": model_type, **SIZES, **changes})
    assert ({shape.window} - {None}) == windows


def test_each_kind_of_layer_is_met_somewhere():
    kinds = {
        kind
        for model_type, c in LAYERED.values()
        for kind in shape_of({**SIZES, **c, "model_type": model_type}).layer_kinds
    }
    assert kinds == {FULL, SLIDING, LINEAR}
    assert {model_type for model_type, _ in LAYERED.values()} == set(FAMILIES)


def test_stated_layer_types_win_over_the_familys_rule():
    types = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    stated = shape_of(
        {"model_type": "qwen2", **SIZES, "layer_types": types, "num_hidden_layers": 4, **WINDOW}
    )
    assert stated.layer_kinds == (FULL, SLIDING, SLIDING, FULL)
    assert stated.window == 8


def test_more_layer_types_than_layers_are_cut():
    cut = shape_of({"model_type": "llama", **SIZES, "layer_types": ["full_attention"] * 99})
    assert len(cut.layer_kinds) == 12


# Numbers other than the layers'


@pytest.mark.parametrize("model_type", FAMILIES)
def test_sizes_are_those_that_transformers_config_states(model_type):
    config = AutoConfig.for_model(model_type)
    shape = shape_of(config.to_dict())
    assert shape.hidden == config.hidden_size
    assert shape.vocab == config.vocab_size
    assert shape.kv_heads == config.num_key_value_heads
    assert shape.head_dim == (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    assert shape.max_context == config.max_position_embeddings
    assert shape.tied == config.tie_word_embeddings
    assert shape.exact


@pytest.mark.parametrize(
    ("config", "rotary"),
    [
        ({"model_type": "phi"}, 4),
        ({"model_type": "phi", "partial_rotary_factor": 0.25}, 2),
        ({"model_type": "phi", "rope_scaling": {"partial_rotary_factor": 0.25}}, 2),
        (
            {
                "model_type": "phi3",
                "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75},
            },
            6,
        ),
        ({"model_type": "llama"}, 8),
        ({"model_type": "llama", "rope_scaling": None}, 8),
        ({"model_type": "qwen3", "head_dim": 16}, 16),
    ],
)
def test_part_of_a_head_may_turn(config, rotary):
    assert shape_of({**SIZES, **config}).rotary_dim == rotary


@pytest.mark.parametrize(
    ("changes", "dense"),
    [
        ({}, 0),
        ({"mlp_only_layers": [0, 3]}, 2),
        ({"decoder_sparse_step": 2}, 6),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [2]}, 9),
    ],
)
def test_dense_layers_among_experts_are_counted_as_transformers_builds_them(changes, dense):
    import torch
    from transformers import AutoModelForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
    config = AutoConfig.for_model("qwen3_moe", **SIZES, **experts, **changes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    without = sum(not hasattr(layer.mlp, "experts") for layer in model.model.layers)
    shape = shape_of(config.to_dict())
    assert shape.dense_layers == dense == without
    assert (shape.experts, shape.experts_per_token, shape.expert_intermediate) == (4, 2, 16)


def test_without_experts_every_layer_is_dense():
    shape = shape_of({"model_type": "llama", **SIZES})
    assert (shape.experts, shape.dense_layers) == (0, 12)


@pytest.mark.parametrize(
    "changes", [{}, {"block_ffn_dim_multiplier": 1.3}, {"block_auto_adjust_ff_dim": False}]
)
def test_lfm2s_adjusted_width_is_that_of_its_mlp(changes):
    import torch
    from transformers import AutoModelForCausalLM

    config = AutoConfig.for_model(
        "lfm2", **{**SIZES, "num_hidden_layers": 1, "intermediate_size": 1200}, **changes
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert shape_of(config.to_dict()).intermediate == model.model.layers[0].feed_forward.w1.out_features


def test_a_number_that_transformers_saves_under_another_name_wins_over_the_default():
    experts = {"num_experts": 4, "moe_intermediate_size": 16}
    config = AutoConfig.for_model("qwen3_moe", **SIZES, **experts).to_diff_dict()
    assert "num_experts" not in config
    assert shape_of(config).experts == shape_of({"model_type": "qwen3_moe", **SIZES, **experts}).experts == 4


def test_a_stated_mlp_does_not_stand_in_for_the_default_width_of_experts():
    assert shape_of({"model_type": "qwen3_moe", **SIZES}).expert_intermediate == 768
    assert (
        shape_of({"model_type": "nonesuch", **SIZES, "num_experts": 8, "moe_k": 2}).expert_intermediate == 48
    )


# A family that is not in the table


def test_an_unlisted_family_is_read_as_a_usual_transformer():
    shape = shape_of({"model_type": "nonesuch", **SIZES})
    assert not shape.exact
    assert shape.layer_kinds == (FULL,) * 12
    assert (shape.kv_heads, shape.head_dim, shape.max_context, shape.tied) == (2, 8, 2048, False)
    assert family_of("nonesuch") is ESTIMATE


def test_an_unlisted_familys_experts_are_found_under_their_usual_names():
    names = {"n_routed_experts": 8, "moe_k": 2, "moe_intermediate_size": 16}
    shape = shape_of({"model_type": "nonesuch", **SIZES, **names})
    assert (shape.experts, shape.experts_per_token, shape.expert_intermediate) == (8, 2, 16)


def test_experts_without_a_number_per_token_are_refused():
    with pytest.raises(UnsupportedModel, match="num_experts_per_tok"):
        shape_of({"model_type": "nonesuch", **SIZES, "num_experts": 8})


def test_without_kv_heads_each_head_has_its_own():
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    assert shape_of({"model_type": "llama", **sizes}).kv_heads == 4
    assert shape_of({"model_type": "llama", **sizes, "num_key_value_heads": None}).kv_heads == 4
