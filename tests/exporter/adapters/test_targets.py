"""targets.py: every tensor of an adapter finds the one it changes, or the adapter is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.adapters.names import Part, Role, role
from exporter.errors import BadAdapter

PREFIX = "base_model.model."
Q = {"target_modules": ["q_proj"]}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def rewrite(folder, change):
    """change(name, tensor) -> (name, tensor), or None to drop it."""
    kept = filter(None, (change(name, tensor) for name, tensor in tensors_of(folder).items()))
    save_file({name: tensor.contiguous() for name, tensor in kept}, folder / "adapter_model.safetensors")


def renamed(folder, old, new):
    rewrite(folder, lambda name, tensor: (name.replace(old, new), tensor))


def base_with_names(base, tmp_path, change):
    """A copy of a base whose tensors have other names."""
    copy = shutil.copytree(base, tmp_path / "renamed")
    tensors = {change(name): tensor for name, tensor in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def changed(tied):
    return {recipe.name for recipe in tied.recipes if recipe.updates}


@pytest.fixture
def refusal(planned):
    def plan(base, *adapters):
        with pytest.raises(BadAdapter) as caught:
            planned(base, *adapters)
        return str(caught.value)

    return plan


# Names


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", ("model.layers.0.mlp.up_proj", Part.A)),
        ("model.layers.0.mlp.up_proj.lora_A.weight", ("model.layers.0.mlp.up_proj", Part.A)),
        ("base_model.model.h.0.c_fc.lora_B.default.weight", ("h.0.c_fc", Part.B)),
        ("base_model.model.h.0.c_fc.lora_B.default.bias", ("h.0.c_fc", Part.B_BIAS)),
        ("base_model.model._orig_mod.h.0._fsdp_wrapped_module.fc.lora_A.weight", ("h.0.fc", Part.A)),
        ("base_model.model.wte.lora_embedding_A", ("wte", Part.EMBEDDING_A)),
        ("base_model.model.wte.lora_embedding_B.default", ("wte", Part.EMBEDDING_B)),
        ("base_model.model.q.lora_magnitude_vector", ("q", Part.MAGNITUDE)),
        ("base_model.model.q.lora_magnitude_vector.default.weight", ("q", Part.MAGNITUDE)),
        ("base_model.model.q.lora_magnitude_vector.weight", ("q", Part.MAGNITUDE)),
        ("base_model.model.e.token_adapter.trainable_tokens_delta", ("e", Part.TOKENS)),
        ("base_model.model.e.token_adapter.base_layer.weight", ("e.weight", Part.SAVED)),
        ("base_model.model.lm_head.modules_to_save.default.weight", ("lm_head.weight", Part.SAVED)),
        ("base_model.model.lm_head.modules_to_save.weight", ("lm_head.weight", Part.SAVED)),
        ("base_model.model.lm_head.base_layer.weight", ("lm_head.weight", Part.SAVED)),
        ("base_model.model.x.experts.base_layer.lora_A.weight", ("x.experts.base_layer", Part.A)),
    ],
)
def test_a_name_tells_the_part_and_the_path(name, expected):
    assert role(name) == Role(*expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (PREFIX, ""),
        (".lora_A.", ".lora_A.default."),
        (PREFIX, f"{PREFIX}_orig_mod."),
        ("self_attn", "_checkpoint_wrapped_module.self_attn"),
        # of other versions of transformers, and of models with other senses
        (f"{PREFIX}model.", f"{PREFIX}language_model.model."),
        (f"{PREFIX}model.", f"{PREFIX}model.language_model."),
        (f"{PREFIX}model.", f"{PREFIX}"),
    ],
)
def test_every_form_of_names_gives_the_same_bits(tiny_qwen2, make_adapter, exported, old, new):
    adapter = make_adapter(tiny_qwen2, **ATTENTION)
    expected = exported(tiny_qwen2, adapter)
    renamed(adapter, old, new)
    found = exported(tiny_qwen2, adapter)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_base_inside_a_vision_model_is_found(tiny_qwen2, tmp_path, make_adapter, planned):
    base = base_with_names(tiny_qwen2, tmp_path, lambda name: name.replace("model.", "model.language_model."))
    assert changed(planned(base, make_adapter(tiny_qwen2, **Q))) == {
        f"model.language_model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
    }


def test_a_part_of_a_path_is_never_enough(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    renamed(adapter, "layers.0.self_attn.", "layers.0.")
    message = refusal(tiny_qwen2, adapter)
    assert "2 of its 4 tensors have no place in the base" in message
    assert "layers.0.q_proj.lora_A.weight [4, 64]" in message


def test_a_name_that_two_tensors_could_be_meant_by_is_refused(tiny_qwen2, tmp_path, make_adapter, refusal):
    def change(name):
        return name.replace("layers.1", "language_model.layers.0")

    base = base_with_names(tiny_qwen2, tmp_path, change)
    adapter = make_adapter(tiny_qwen2, **Q)
    rewrite(adapter, lambda name, tensor: None if "layers.1" in name else (name, tensor))
    renamed(adapter, f"{PREFIX}model.", f"{PREFIX}transformer.")
    assert "have no place" in refusal(base, adapter)


# What has no place


def test_five_names_and_the_number_of_all_are_told(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, target_modules=["q_proj", "k_proj"])
    renamed(adapter, "self_attn", "attention")
    message = refusal(tiny_qwen2, adapter)
    assert message.count("[4, 64]") + message.count(", 4]") == 5
    assert "(and 3 more)" in message
    assert str(tiny_qwen2) in message  # what it was trained on


def test_an_adapter_of_a_deeper_model_says_so(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    renamed(adapter, "layers.1", "layers.31")
    assert "layers up to number 31, and this base has 2" in refusal(tiny_qwen2, adapter)


def test_a_classifier_is_refused_with_its_task(tiny_qwen2, make_adapter, edit_config, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    edit_config(adapter, task_type="SEQ_CLS", modules_to_save=["score"])
    tensors = tensors_of(adapter) | {f"{PREFIX}score.weight": torch.ones(3, 64)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    message = refusal(tiny_qwen2, adapter)
    assert "score.weight [3, 64]" in message
    assert "SEQ_CLS" in message


def test_a_half_of_a_pair_is_refused(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    half = "layers.0.self_attn.q_proj.lora_B"
    rewrite(adapter, lambda name, tensor: None if half in name else (name, tensor))
    assert "layers.0.self_attn.q_proj has lora_A and lacks" in refusal(tiny_qwen2, adapter)


def test_a_bias_for_a_layer_without_one_is_refused(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, target_modules=["o_proj"], lora_bias=True)
    assert "the base has none at model.layers.0.self_attn.o_proj" in refusal(tiny_qwen2, adapter)


def test_two_adapters_in_one_file_are_refused(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    more = {
        name.replace("lora_A", "lora_A.other").replace("lora_B", "lora_B.other"): tensor
        for name, tensor in tensors_of(adapter).items()
    }
    save_file(tensors_of(adapter) | more, adapter / "adapter_model.safetensors")
    assert "holds several adapters" in refusal(tiny_qwen2, adapter)


# What does not fit


def resized(folder, word, rows=None, columns=None):
    def change(name, tensor):
        if word not in name:
            return name, tensor
        return name, torch.ones(rows or tensor.shape[0], columns or tensor.shape[1])

    rewrite(folder, change)


def test_an_adapter_of_another_size_is_refused_with_both_shapes(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    resized(adapter, "lora_A", columns=128)
    message = refusal(tiny_qwen2, adapter)
    assert "it is for [64, 128], and model.layers.0.self_attn.q_proj.weight is [64, 64]" in message
    assert "Give the model that it was trained on" in message


def test_a_padded_repack_is_told_from_another_size(tiny_qwen2, tmp_path, make_adapter, refusal):
    """Qwen2-72B-Instruct-GPTQ-Int4 has 29,696 where Qwen2-72B-Instruct has 29,568."""
    base = shutil.copytree(tiny_qwen2, tmp_path / "wide")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(base / "model.safetensors") | {name: torch.zeros(3740, 64, dtype=torch.bfloat16)}
    save_file(tensors, base / "model.safetensors")
    adapter = make_adapter(tiny_qwen2, target_modules=["up_proj"], layers_to_transform=[0])
    resized(adapter, "lora_B", rows=3840)
    message = refusal(base, adapter)
    assert "it is for [3840, 64], and model.layers.0.mlp.up_proj.weight is [3740, 64]" in message
    assert "quantized repack" in message


def test_a_rank_that_the_config_does_not_say_is_refused(tiny_qwen2, make_adapter, edit_config, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    edit_config(adapter, rank_pattern={"layers.1.self_attn.q_proj": 8})
    message = refusal(tiny_qwen2, adapter)
    assert "1 parts do not fit" in message
    assert "layers.1.self_attn.q_proj: A is [4, 64] and B [64, 4], and adapter_config.json says" in message


def test_inputs_and_outputs_the_wrong_way_round_are_refused(tiny_gpt2, make_adapter, refusal):
    adapter = make_adapter(tiny_gpt2, target_modules=["c_attn"])
    flipped = {"lora_A": (4, 192), "lora_B": (64, 4)}
    rewrite(
        adapter, lambda name, tensor: (name, torch.ones(*next(v for k, v in flipped.items() if k in name)))
    )
    message = refusal(tiny_gpt2, adapter)
    assert "c_attn: it is for a matrix of [64, 192] [outputs, inputs]" in message
    assert "fan_in_fan_out" in message


def test_the_flag_of_a_square_matrix_is_pefts_guess_and_the_layer_counts(
    tiny_gpt2, make_adapter, edit_config, exported
):
    """peft saves fan_in_fan_out as the last layer that it met had it."""
    adapter = make_adapter(tiny_gpt2, target_modules=["c_proj"])
    expected = exported(tiny_gpt2, adapter)
    edit_config(adapter, fan_in_fan_out=False)
    found = exported(tiny_gpt2, adapter)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_convolution_is_refused(tiny_qwen2, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen2, **Q)
    rewrite(adapter, lambda name, tensor: (name, tensor[:, :, None, None]))
    assert "is a convolution" in refusal(tiny_qwen2, adapter)


@pytest.mark.parametrize("use_dora", [True, False])
def test_magnitudes_and_use_dora_belong_together(tiny_qwen2, make_adapter, edit_config, refusal, use_dora):
    adapter = make_adapter(tiny_qwen2, **Q, use_dora=not use_dora)
    edit_config(adapter, use_dora=use_dora)
    assert "lora_magnitude_vector" in refusal(tiny_qwen2, adapter)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([1, 96], "row 96, and model.embed_tokens.weight has 96"),
        ([1], "asks for [1, 64]"),
        (None, "does not say"),
    ],
)
def test_tokens_that_the_config_does_not_place_are_refused(
    tiny_qwen2, make_adapter, edit_config, refusal, rows, said
):
    adapter = make_adapter(tiny_qwen2, **Q, trainable_token_indices=[1, 2])
    edit_config(adapter, trainable_token_indices=rows)
    assert said in refusal(tiny_qwen2, adapter)


def test_experts_of_another_size_are_refused(tiny_qwen3_moe, make_adapter, refusal):
    adapter = make_adapter(tiny_qwen3_moe, target_parameters=["experts.down_proj"])
    resized(adapter, "lora_B", rows=72)
    assert "it is for [72, 24] per expert, and the base is [64, 24]" in refusal(tiny_qwen3_moe, adapter)


# Several


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"bias": "all"},
    ],
)
def test_what_is_not_added_cannot_be_weighted(tiny_qwen2, make_adapter, refusal, planned, lora):
    adapter = make_adapter(tiny_qwen2, **Q, **lora)
    planned(tiny_qwen2, adapter)
    assert "a weight of 0.5 is asked for" in refusal(tiny_qwen2, (adapter, 0.5))


@pytest.mark.parametrize("lora", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [1, 2]}])
def test_two_adapters_that_replace_the_same_are_refused(tiny_qwen2, make_adapter, refusal, lora):
    adapters = [make_adapter(tiny_qwen2, **Q, **lora) for _ in range(2)]
    message = refusal(tiny_qwen2, *adapters)
    assert all(str(adapter) in message for adapter in adapters)


def test_two_adapters_may_replace_different_tokens(tiny_qwen2, make_adapter, exported):
    one = make_adapter(tiny_qwen2, **Q, trainable_token_indices=[1, 2])
    other = make_adapter(tiny_qwen2, **Q, trainable_token_indices=[3])
    name = "model.embed_tokens.weight"
    both, base = exported(tiny_qwen2, one, other)[name], exported(tiny_qwen2)[name]
    assert (both != base).any(dim=1).nonzero().flatten().tolist() == [1, 2, 3]


def test_without_adapters_every_tensor_stays_as_it_is(tiny_tied, planned):
    tied = planned(tiny_tied)
    assert [recipe.name for recipe in tied.recipes] == list(load_names(tiny_tied))
    assert not changed(tied)


def load_names(base):
    from loader import checkpoint

    return (info.name for info in checkpoint.read_any(base).tensors)


# Experts, as other versions saved them


def write_adapter(folder, tensors, **config):
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2} | config)
    )
    return folder


@pytest.mark.parametrize(
    ("base", "path", "name"),
    [
        ("tiny_qwen3_moe", "mlp.experts.3.up_proj", "mlp.experts.3.up_proj"),
        ("tiny_mixtral", "block_sparse_moe.experts.2.w3", "block_sparse_moe.experts.2.w3"),
        ("tiny_mixtral", "mlp.experts.2.up_proj", "block_sparse_moe.experts.2.w3"),
    ],
)
def test_an_adapter_of_single_experts_finds_each(tiny_model, tmp_path, exported, base, path, name):
    """transformers 4 had a module per expert, and so did peft."""
    base, name = tiny_model(base), f"model.layers.1.{name}.weight"
    before = exported(base)
    a, b = torch.randn(2, 64), torch.randn(len(before[name]), 2)
    module = f"{PREFIX}model.layers.1.{path}"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    found = exported(base, write_adapter(tmp_path / "adapter", tensors))
    assert torch.equal(found[name], (before[name].float() + b @ a).bfloat16())
    assert all(torch.equal(found[other], before[other]) for other in found if other != name)


def test_stacked_experts_that_an_older_peft_saw_the_other_way_round_are_turned(
    tiny_qwen3_moe, tmp_path, exported
):
    """peft 0.17 took every stack for [experts, inputs, outputs]."""
    a, b = torch.randn(4 * 2, 48), torch.randn(64, 2 * 4)
    module = f"{PREFIX}model.layers.0.mlp.experts"
    tensors = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    folder = write_adapter(tmp_path / "adapter", tensors, target_parameters=["experts.gate_up_proj"])
    before, found = exported(tiny_qwen3_moe), exported(tiny_qwen3_moe, folder, block=7)
    for expert in range(4):
        update = (b[:, expert::4] @ a[expert * 2 : expert * 2 + 2]).T.bfloat16()
        for name, part in (("gate_proj", update[:24]), ("up_proj", update[24:])):
            name = f"model.layers.0.mlp.experts.{expert}.{name}.weight"
            assert torch.equal(found[name], (before[name].float() + part.float()).bfloat16())


def test_parameters_that_are_not_all_there_are_refused(tiny_qwen3_moe, make_adapter, edit_config, refusal):
    adapter = make_adapter(tiny_qwen3_moe, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    edit_config(adapter, target_parameters=["experts.down_proj"])
    assert "experts.base_layer.lora_A.weight [16, 64]" in refusal(tiny_qwen3_moe, adapter)


def test_an_adapter_of_a_vector_is_refused(tiny_qwen2, tmp_path, refusal):
    module = f"{PREFIX}model.norm"
    tensors = {f"{module}.lora_A.weight": torch.ones(2, 64), f"{module}.lora_B.weight": torch.ones(64, 2)}
    assert "model.norm.weight is [64]" in refusal(tiny_qwen2, write_adapter(tmp_path / "plain", tensors))
    folder = write_adapter(tmp_path / "parameter", tensors, target_parameters=["norm.weight"])
    assert "two and three dimensions" in refusal(tiny_qwen2, folder)
