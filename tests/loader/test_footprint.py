"""loader/footprint.py against the models and caches that transformers itself makes, byte for byte."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from loader.checkpoint import ModelSpec, TensorInfo, read
from loader.errors import BadPlanRequest, UnsupportedModel
from loader.families import FAMILIES
from loader.footprint import choose_dtype, measure, module_name

SIZES = {
    "vocab_size": 72, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE_HEADS = {"head_dim": 16}  # wider together than the hidden size
WINDOW = 8
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, **WIDE_HEADS}
LISTED = {
    "llama": ("llama", {}),
    "llama 3.1's long positions": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            }
        },
    ),
    "granite": ("granite", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "qwen2": ("qwen2", {}),
    "qwen2 with a window above layer 2": (
        "qwen2", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", WIDE_HEADS),
    "smollm3": ("smollm3", {}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
    "gemma": ("gemma", {**WIDE_HEADS, "num_key_value_heads": 1}),
    "gemma2": ("gemma2", {**WIDE_HEADS, "sliding_window": WINDOW}),
    "gemma3": ("gemma3_text", {**WIDE_HEADS, "sliding_window": WINDOW, "num_hidden_layers": 7}),
    "gemma3 of sliding layers only": ("gemma3_text", {**WIDE_HEADS, "sliding_window": WINDOW}),
    "phi": ("phi", {"num_key_value_heads": 4}),
    "phi3": ("phi3", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", {"num_local_experts": 4}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe with a dense layer": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [1]}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv", "conv"]}),
    "lfm2 with biased convolutions": (
        "lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"], "conv_bias": True},
    ),
}  # fmt: skip
UNLISTED = {
    "olmo2": ("olmo2", {}),
    "glm4": ("glm4", {}),
    "qwen2_moe": ("qwen2_moe", EXPERTS),
    "qwen3_next": ("qwen3_next", {**EXPERTS, "num_experts_per_tok": 2}),
}
# A short convolution's state and a gated delta rule's; the others have keys and values.
CACHES = {**LISTED, "qwen3_next": UNLISTED["qwen3_next"]}


def config_of(model, **changes):
    family, others = model
    return AutoConfig.for_model(family, **{**SIZES, **others, **changes})


def built(config, dtype=torch.bfloat16, device="meta"):
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved(config, folder, dtype=torch.bfloat16):
    """What save_pretrained writes of such a model, read as any checkpoint."""
    built(config, dtype, "cpu").save_pretrained(folder)
    return read(folder)


def owned_bytes(model):
    """Bytes of the parameters and buffers that each module owns; tied ones belong to who comes first."""
    counted, amounts = set(), {}
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in counted:
                counted.add(id(tensor))
                amounts[name] = amounts.get(name, 0) + tensor.nbytes
    return amounts


def unit_bytes(footprint):
    return {unit.module: unit.n_bytes for unit in footprint.units if unit.n_bytes}


def from_config(config, dtype="bfloat16"):
    """A footprint for which no header is needed: of the cache, or of numbers in the config."""
    return measure(
        ModelSpec("test", None, config if isinstance(config, dict) else config.to_dict(), ()), dtype
    )


def tensor(name, shape, dtype="BF16", n_bytes=2):
    size = n_bytes
    for dim in shape:
        size *= dim
    return TensorInfo(name, dtype, shape, "model.safetensors", 0, size)


# Weights


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("model", LISTED.values(), ids=LISTED)
def test_each_module_has_the_bytes_that_transformers_gives_it(tmp_path, model, tied):
    config = config_of(model, tie_word_embeddings=tied)
    footprint = measure(saved(config, tmp_path))
    expected = owned_bytes(built(config))
    assert unit_bytes(footprint) == expected
    assert footprint.weights_bytes == sum(expected.values())
    assert footprint.exact


@pytest.mark.parametrize("model", UNLISTED.values(), ids=UNLISTED)
def test_an_unlisted_family_is_counted_too_and_labelled_an_estimate(tmp_path, model):
    config = config_of(model)
    footprint = measure(saved(config, tmp_path))
    assert unit_bytes(footprint) == owned_bytes(built(config))
    assert not footprint.exact


def test_every_family_of_the_table_is_held_against_a_model():
    assert {family for family, _ in LISTED.values()} == set(FAMILIES)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_a_checkpoint_is_counted_in_the_dtype_it_is_loaded_in(tmp_path, name, dtype):
    config = config_of(LISTED[name])
    spec = saved(config, tmp_path, torch.float32)
    assert unit_bytes(measure(spec, dtype)) == owned_bytes(built(config, getattr(torch, dtype)))


def test_a_tied_head_has_no_bytes_of_its_own_and_names_its_owner(tmp_path):
    units = {unit.module: unit for unit in measure(saved(config_of(LISTED["gemma"]), tmp_path)).units}
    assert (units["lm_head"].n_bytes, units["lm_head"].tied_to) == (0, "model.embed_tokens")
    assert units["model.embed_tokens"].tied_to is None


@pytest.mark.parametrize("kept", [("model.embed_tokens",), ("lm_head",), ("model.embed_tokens", "lm_head")])
def test_tied_weights_count_once_under_whichever_names_the_file_has_them(tmp_path, kept):
    config = config_of(LISTED["qwen2"], tie_word_embeddings=True)
    spec = saved(config, tmp_path)
    others = tuple(t for t in spec.tensors if t.name != "model.embed_tokens.weight")
    matrices = tuple(tensor(f"{name}.weight", (72, 32)) for name in kept)
    footprint = measure(replace(spec, tensors=(*others, *matrices)))
    assert unit_bytes(footprint) == owned_bytes(built(config))


@pytest.mark.parametrize("with_matrix", [True, False])
def test_a_tied_heads_bias_is_its_own(tmp_path, with_matrix):
    config = config_of(LISTED["phi"], tie_word_embeddings=True)
    spec = saved(config, tmp_path)
    extra = (tensor("lm_head.weight", (72, 32)),) if with_matrix else ()
    units = {u.module: u.n_bytes for u in measure(replace(spec, tensors=(*spec.tensors, *extra))).units}
    assert units["lm_head"] == 72 * 2
    assert units["model.embed_tokens"] == 72 * 32 * 2


def test_a_saved_base_model_is_counted_as_the_causal_model_that_is_built(tmp_path):
    config = config_of(LISTED["qwen3"], tie_word_embeddings=True)
    built(config, device="cpu").model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "architectures": None}))
    spec = read(tmp_path)
    assert any(t.name.startswith("layers.") for t in spec.tensors)
    assert unit_bytes(measure(spec)) == owned_bytes(built(config))


def test_rotary_tables_in_old_checkpoints_are_not_counted_twice(tmp_path):
    config = config_of(LISTED["llama"])
    spec = saved(config, tmp_path)
    old = tuple(tensor(f"model.layers.{i}.self_attn.rotary_emb.inv_freq", (4,), "F32", 4) for i in range(4))
    assert unit_bytes(measure(replace(spec, tensors=(*spec.tensors, *old)))) == owned_bytes(built(config))


def test_integers_keep_their_size_whatever_dtype_is_asked_for(tmp_path):
    spec = saved(config_of(LISTED["llama"]), tmp_path)
    counters = replace(spec, tensors=(*spec.tensors, tensor("model.steps.seen", (3,), "I64", 8)))
    for dtype in ("bfloat16", "float32"):
        assert unit_bytes(measure(counters, dtype))["model.steps"] == 24


@pytest.mark.parametrize(
    ("family", "stored", "module"),
    [
        ("mixtral", "model.layers.3.block_sparse_moe.experts.7.w1.weight", "model.layers.3.mlp.experts"),
        ("mixtral", "model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.mlp.gate"),
        ("qwen3_moe", "model.layers.0.mlp.experts.12.up_proj.weight", "model.layers.0.mlp.experts"),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts"),
        ("qwen2", "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_checkpoints_names_become_those_of_the_built_model(family, stored, module):
    assert module_name(stored, FAMILIES[family]) == module


# What a module is, and when it runs


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi", "lfm2", "qwen3_moe with a dense layer"])
def test_units_stand_in_the_order_of_layers(tmp_path, name):
    units = measure(saved(config_of(LISTED[name], tie_word_embeddings=False), tmp_path)).units
    layers = [unit.layer for unit in units if unit.layer is not None]
    assert layers == sorted(layers)
    assert set(layers) == set(range(len(measure(read(tmp_path)).layers)))
    outside = [unit.module.rpartition(".")[2] for unit in units if unit.layer is None]
    assert outside[:2] == ["embed_tokens", "rotary_emb"]
    assert outside[-1] == "lm_head"
    assert units[0].kind == "embed"
    assert units[-1].kind == "head"


@pytest.mark.parametrize("name", ["llama", "qwen3", "phi", "mixtral"])
def test_blocks_of_a_layer_stand_in_the_order_in_which_they_run(tmp_path, name):
    config = config_of(LISTED[name])
    blocks = [
        _block(unit.module) for unit in measure(saved(config, tmp_path)).units if unit.layer is not None
    ]
    model, ran = built(config), []
    for module, part in model.named_modules():
        part.register_forward_pre_hook(lambda *_, module=module: ran.append(module))
    model(torch.zeros(1, 2, dtype=torch.long, device="meta"))
    assert list(dict.fromkeys(blocks)) == [module for module in ran if module in set(blocks)]


def _block(module):
    """model.layers.0.mlp of model.layers.0.mlp.up_proj."""
    return ".".join(module.split(".")[:4])


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        (
            "qwen3",
            {
                "input_layernorm": "norm", "self_attn.q_proj": "attention", "self_attn.q_norm": "norm",
                "self_attn.k_norm": "norm", "self_attn.o_proj": "attention", "mlp.gate_proj": "mlp",
                "mlp.down_proj": "mlp",
            },
        ),
        ("mixtral", {"mlp.experts": "mlp", "mlp.gate": "other", "self_attn.v_proj": "attention"}),
        ("phi3", {"self_attn.qkv_proj": "attention", "mlp.gate_up_proj": "mlp"}),
        ("phi", {"self_attn.dense": "attention", "mlp.fc1": "mlp", "input_layernorm": "norm"}),
        (
            "lfm2",
            {
                "conv.in_proj": "attention", "conv.conv": "other", "feed_forward.w2": "mlp",
                "operator_norm": "norm", "ffn_norm": "norm",
            },
        ),
    ],
)  # fmt: skip
def test_what_a_module_is_decides_whether_it_may_leave(tmp_path, name, kinds):
    units = {u.module: u for u in measure(saved(config_of(LISTED[name]), tmp_path)).units}
    assert {module: units[f"model.layers.0.{module}"].kind for module in kinds} == kinds
    others = {units[module].kind for module in ("model.embed_tokens", "model.rotary_emb", "lm_head")}
    assert others == {"embed", "buffer", "head"}


def test_a_block_that_owns_a_tensor_beside_its_children_is_taken_as_one_piece(tmp_path):
    spec = saved(config_of(LISTED["llama"]), tmp_path)
    mixed = replace(spec, tensors=(*spec.tensors, tensor("model.layers.1.mlp.scale", (32,))))
    units = {unit.module: unit for unit in measure(mixed).units}
    for module in ("mlp", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        assert units[f"model.layers.1.{module}"].kind == "other"
    assert units["model.layers.0.mlp.up_proj"].kind == "mlp"


# KV cache and states


def kept_bytes(cache):
    """Bytes of each layer's keys and values, or states, in transformers' own cache."""
    return [sum(tensor.nbytes for tensor in _tensors(layer)) for layer in cache.layers]


def _tensors(layer):
    states = (getattr(layer, name, {}).values() for name in ("conv_states", "recurrent_states"))
    tensors = (getattr(layer, "keys", None), getattr(layer, "values", None), *(t for s in states for t in s))
    return [tensor for tensor in tensors if tensor is not None]


def forward(model, cache, tokens):
    with torch.no_grad():
        model(torch.zeros(1, tokens, dtype=torch.long, device="meta"), past_key_values=cache)


@pytest.mark.parametrize("model", CACHES.values(), ids=CACHES)
def test_each_layer_keeps_the_bytes_that_transformers_cache_keeps(model):
    config = config_of(model)
    theirs, footprint = built(config), from_config(config)
    for tokens in (1, WINDOW - 1):
        cache = DynamicCache(config=config)
        forward(theirs, cache, tokens)
        expected = kept_bytes(cache)
        assert [layer.n_bytes(tokens, tokens) for layer in footprint.layers] == expected
        assert footprint.kv_bytes(tokens, tokens) == sum(expected)


@pytest.mark.parametrize(
    "name",
    [
        "mistral",
        "qwen2 with a window above layer 2",
        "gemma2",
        "gemma3",
        "phi3",
        "starcoder2",
        "lfm2",
        "llama",
    ],
)
def test_beyond_its_window_a_layer_has_room_for_what_attention_reads_and_one_token(name):
    config, chunk = config_of(LISTED[name]), WINDOW + 1
    theirs, cache = built(config), DynamicCache(config=config)
    forward(theirs, cache, chunk)
    reads = [layer.get_mask_sizes(chunk)[0] if hasattr(layer, "keys") else 0 for layer in cache.layers]
    forward(theirs, cache, chunk)
    for ours, kept, read_tokens in zip(from_config(config).layers, kept_bytes(cache), reads, strict=True):
        if ours.window is None:
            assert ours.n_bytes(2 * chunk, chunk) == kept
        else:
            assert ours.n_bytes(2 * chunk, chunk) == (read_tokens + 1) * ours.bytes_per_token > kept


@pytest.mark.parametrize("name", ["qwen2", "lfm2", "gemma2"])
def test_a_float32_cache_is_that_of_transformers_too(name):
    config = config_of(LISTED[name])
    cache = DynamicCache(config=config)
    forward(built(config, torch.float32), cache, 6)
    assert from_config(config, "float32").kv_bytes(6, 6) == sum(kept_bytes(cache))


def test_only_layers_without_a_window_make_a_longer_context_dearer():
    footprint = from_config(config_of(LISTED["gemma2"]))  # two of four layers slide
    per_layer = 2 * 2 * 16 * 2
    assert footprint.kv_bytes_per_token == 2 * per_layer
    grown = footprint.kv_bytes(1001, 4) - footprint.kv_bytes(1000, 4)
    assert grown == footprint.kv_bytes_per_token


def test_linear_layers_cost_the_same_at_any_length():
    footprint = from_config(config_of(LISTED["lfm2"]))
    states = [layer for layer in footprint.layers if layer.kind == "linear"]
    assert len(states) == 3
    assert all(layer.n_bytes(1, 1) == layer.n_bytes(10**6, 64) > 0 for layer in states)


# Numbers counted by hand


def test_qwen2_5_7b_has_the_bytes_that_its_card_says(tmp_path, fake_checkpoint, configs):
    footprint = measure(read(fake_checkpoint(tmp_path, configs["qwen2-7b"], shards=4)))
    embedding, head = 152_064 * 3584, 152_064 * 3584
    attention = 2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512  # q and o, k and v, three biases
    layer = attention + 3 * 3584 * 18_944 + 2 * 3584
    assert 2 * (embedding + head + 28 * layer + 3584) == 15_231_233_024
    rotary = 2 * 64 * 4  # inv_freq twice, in float32
    assert footprint.weights_bytes == 15_231_233_024 + rotary
    assert (footprint.dtype, footprint.exact) == ("bfloat16", True)
    assert footprint.kv_bytes_per_token == 57_344 == 28 * 2 * 4 * 128 * 2
    assert footprint.kv_bytes(8192, 2048) == 8192 * 57_344


def test_llama_3_1_70b_has_the_bytes_that_its_card_says(tmp_path, fake_checkpoint, configs):
    footprint = measure(read(fake_checkpoint(tmp_path, configs["llama3-70b"], shards=30)))
    assert footprint.weights_bytes == 2 * 70_553_706_496 + 2 * 64 * 4
    assert footprint.kv_bytes_per_token == 327_680 == 80 * 2 * 8 * 128 * 2
    assert footprint.max_context == 131_072


# Dtype


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("stated", "chosen"), [("float16", "float16"), ("torch.bfloat16", "bfloat16"), ("float32", "float32")]
)
def test_auto_is_the_dtype_that_the_config_states(key, stated, chosen):
    spec = ModelSpec("test", None, {key: stated}, (tensor("model.norm.weight", (4,), "F32", 4),))
    assert choose_dtype(spec, "auto") == chosen


@pytest.mark.parametrize("stated", [{}, {"dtype": None}, {"dtype": "auto"}, {"dtype": "float8_e4m3fn"}])
def test_auto_without_a_usable_statement_is_the_dtype_of_most_bytes(stated):
    norm = tensor("model.norm.weight", (64,), "F32", 4)
    matrix = tensor("lm_head.weight", (64, 64), "F16")
    assert choose_dtype(ModelSpec("test", None, stated, (norm, matrix)), "auto") == "float16"
    assert choose_dtype(ModelSpec("test", None, stated, (norm,)), "auto") == "float32"


def test_auto_with_nothing_to_go_by_is_float32():
    counter = tensor("model.steps", (10**6,), "I64", 8)
    assert choose_dtype(ModelSpec("test", None, {}, (counter,)), "auto") == "float32"


def test_an_explicit_dtype_wins_over_the_config():
    assert choose_dtype(ModelSpec("test", None, {"dtype": "float32"}, ()), "bfloat16") == "bfloat16"


@pytest.mark.parametrize("dtype", ["int8", "bf16", "float64", "", "AUTO"])
def test_a_dtype_that_cannot_be_loaded_is_refused_with_those_that_can(configs, dtype):
    with pytest.raises(BadPlanRequest, match="auto, bfloat16, float16, float32"):
        measure(ModelSpec("test", None, configs["tiny"], ()), dtype)


# Logits, activations


def test_logits_are_counted_as_the_model_gives_them_and_as_the_sampler_copies_them(configs):
    vocab = configs["qwen2-7b"]["vocab_size"]
    half, full = (from_config(configs["qwen2-7b"], dtype) for dtype in ("bfloat16", "float32"))
    assert half.logits_bytes(1) == (vocab + 3584) * 2 + vocab * 6 * 4
    assert full.logits_bytes(1) == (vocab + 3584) * 4 + vocab * 6 * 4
    assert half.logits_bytes(8) == 8 * half.logits_bytes(1)
    more = half.logits_bytes(64) - half.logits_bytes(8)
    assert more == 56 * (vocab + 3584) * 2  # 8 rows are chosen at once


def test_a_chunk_is_never_longer_than_the_context(configs):
    footprint = from_config(configs["qwen2-7b"])
    assert footprint.activation_bytes(2048, 100) == footprint.activation_bytes(100, 100)
    assert footprint.activation_bytes(2048, 4096) > footprint.activation_bytes(256, 4096)


# What cannot be told


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
@pytest.mark.parametrize("family", ["qwen2", "mixtral", "lfm2", "nonesuch"])
@pytest.mark.parametrize("value", [None, 0, -4, "many", 2.5])
def test_a_config_without_a_usable_number_is_refused_by_its_name(family, key, value):
    config = {"model_type": family, **SIZES, key: value}
    with pytest.raises(UnsupportedModel, match=f"no usable '{key}'") as caught:
        from_config(config)
    assert caught.value.model_type == family


@pytest.mark.parametrize(
    ("key", "alias"),
    [("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head")],
)
def test_a_number_under_an_older_name_is_read(key, alias):
    renamed = {alias if name == key else name: value for name, value in SIZES.items()}
    plain = from_config({"model_type": "nonesuch", **SIZES})
    assert from_config({"model_type": "nonesuch", **renamed}) == plain
    assert not plain.exact


def test_of_a_model_with_several_parts_the_text_counts():
    parts = {
        "model_type": "gemma3",
        "text_config": {**SIZES, "head_dim": 16},
        "vision_config": {"hidden_size": 9},
    }
    assert from_config(parts).shape.hidden == 32
    assert from_config(parts).kv_bytes_per_token == 4 * 2 * 2 * 16 * 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", "linear"), ("rope_parameters", [1]), ("layer_types", 5), ("head_dim", "64"),
        ("text_config", [1]), ("partial_rotary_factor", "a"), ("num_hidden_layers", 100_000_000),
        ("tie_word_embeddings", "false"), ("hidden_size", "16"),
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_refused(fake_checkpoint, configs, tmp_path, key, value):
    folder = fake_checkpoint(tmp_path, configs["tiny"])
    (folder / "config.json").write_text(json.dumps({**configs["tiny"], key: value}))
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        measure(read(folder))
