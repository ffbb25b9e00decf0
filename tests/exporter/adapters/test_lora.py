"""lora.py, dora.py, experts.py: the bits that peft's merge_and_unload and save_pretrained give."""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from exporter.adapters.dora import column_norms
from exporter.adapters.product import Product
from exporter.merge import open_updates
from exporter.weights import Inputs, matrix

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    wrong = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not wrong


CASES = {
    "lora": ("tiny_qwen2", {"target_modules": LINEAR}),
    "rslora with patterns": (
        "tiny_llama",
        {
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {"layers.0.self_attn.q_proj": 2, r".*\.1\.mlp\.(up|gate)_proj": 7},
            "alpha_pattern": {"down_proj": 5, "self_attn.k_proj": 3},
        },
    ),
    "dora": ("tiny_qwen2", {"target_modules": LINEAR, "use_dora": True, "lora_alpha": 8}),
    "lora_bias": ("tiny_qwen2", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "trained biases": ("tiny_qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "embedding": (
        "tiny_qwen2", {"target_modules": ["embed_tokens", "lm_head", "q_proj"], "lora_alpha": 16},
    ),
    "embedding dora": ("tiny_qwen2", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "modules_to_save": (
        "tiny_qwen2",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    ),
    "tokens": (
        "tiny_qwen2",
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [90, 3, 64], "lm_head": [5]},
        },
    ),
    "tokens of one matrix for both": (
        "tiny_tied", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ),
    "gpt2": ("tiny_gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "lora_bias": True}),
    "gpt2 dora": ("tiny_gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "use_dora": True}),
    "stacked experts": (
        "tiny_qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        },
    ),
    "one of two stacks": ("tiny_qwen3_moe", {"target_parameters": ["experts.down_proj"]}),
    "experts named as modules": ("tiny_mixtral", {"target_modules": ["w1", "w2", "w3", "o_proj"]}),
    "inputs first": ("tiny_gpt_oss", {"target_parameters": ["gate_up_proj", "down_proj", "router.weight"]}),
    "a bias per expert": ("tiny_gpt_oss", {"target_parameters": ["gate_up_proj_bias", "down_proj"]}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_of_pefts_merge(tiny_model, make_adapter, exported, merged_by_peft, case):
    name, lora = CASES[case]
    base = tiny_model(name)
    adapter = make_adapter(base, **lora)
    theirs = merged_by_peft(base, adapter)
    same = assert_close if case == "gpt2 dora" and not torch_adds_row_after_row() else assert_same
    for rows in (10**9, 64, 7):
        same(exported(base, adapter, block=rows), theirs)


def torch_adds_row_after_row():
    """Whether the norm of a column is summed in that order: with AVX-512 it is, with AVX2 it is not."""
    matrix = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    return torch.equal(torch.linalg.norm(matrix.T, dim=1), column_norms(iter([matrix.clone()])))


def assert_close(ours, theirs):
    """To the last place of bf16, and all but a thousandth of the numbers to the bit."""
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2**-7, atol=0)
        assert (ours[name] != tensor).float().mean() <= 1e-3


def test_an_adapter_saved_in_16_bits_is_merged_in_fp32(tiny_qwen2, make_adapter, exported, merged_by_peft):
    adapter = make_adapter(tiny_qwen2, target_modules=LINEAR, change=lambda model: model.to(torch.bfloat16))
    assert_same(exported(tiny_qwen2, adapter, block=5), merged_by_peft(tiny_qwen2, adapter))


def test_a_block_of_one_row_gives_the_same_bits(tiny_qwen2, make_adapter, exported):
    """BLAS multiplies a single row as a vector, and adds in another order."""
    adapter = make_adapter(tiny_qwen2, r=16, target_modules=LINEAR)
    assert_same(exported(tiny_qwen2, adapter, block=1), exported(tiny_qwen2, adapter))


def test_several_adapters_are_summed_in_fp32_each_times_its_weight(tiny_qwen2, make_adapter, exported):
    first = make_adapter(tiny_qwen2, r=8, lora_alpha=16, target_modules=["q_proj"])
    second = make_adapter(tiny_qwen2, r=2, lora_alpha=3, target_modules=["q_proj", "k_proj"])
    found = exported(tiny_qwen2, (first, 0.5), (second, -2), block=9)
    base, name = exported(tiny_qwen2), "model.layers.1.self_attn.q_proj"
    summed = base[f"{name}.weight"].float() + delta(first, name) * 2 * 0.5 + delta(second, name) * 1.5 * -2
    assert (found[f"{name}.weight"].float() - summed).abs().max() < 2**-8 * summed.abs().max()
    assert torch.equal(found[f"{name}.weight"], summed.bfloat16())


def test_the_sum_of_an_embeddings_adapters_is_rounded_once(tiny_qwen2, make_adapter, exported):
    """One alone has peft's bits, which are rounded twice there."""
    pair = [make_adapter(tiny_qwen2, target_modules=["embed_tokens"]) for _ in range(2)]
    path, name = "model.embed_tokens", "model.embed_tokens.weight"
    summed = exported(tiny_qwen2)[name].float()
    for adapter in pair:
        tensors = load_file(adapter / "adapter_model.safetensors")
        b, a = (tensors[f"base_model.model.{path}.lora_embedding_{side}"] for side in "BA")
        summed += (b @ a).T * 1.5
    assert torch.equal(exported(tiny_qwen2, *pair)[name], summed.bfloat16())


def test_a_dora_after_another_adapter_takes_its_norm_from_the_base_alone(fp32_qwen2, make_adapter, exported):
    plain = make_adapter(fp32_qwen2, target_modules=["q_proj"])
    dora = make_adapter(fp32_qwen2, target_modules=["q_proj", "k_proj"], use_dora=True)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(fp32_qwen2, dtype=torch.float32), plain, "plain"
    )
    model.load_adapter(dora, "dora")
    theirs = model.base_model.merge_and_unload(adapter_names=["plain", "dora"]).state_dict()
    ours = exported(fp32_qwen2, plain, dora, block=7, dtype=torch.float32)
    for side in "qk":
        name = f"model.layers.0.self_attn.{side}_proj.weight"
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    alone = exported(fp32_qwen2, dora, plain, dtype=torch.float32)
    assert not torch.allclose(alone[name.replace("k_proj", "q_proj")], ours[name.replace("k_proj", "q_proj")])


def test_a_slice_of_a_fused_matrix_gets_its_rows_of_the_update(tiny_qwen2, make_adapter, planned):
    """As exporter/conversion/qwen1.py cuts q, k and v out of one matrix."""
    lora = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 70], "lora_bias": True}
    adapters = [make_adapter(tiny_qwen2, **lora)]
    adapters += [make_adapter(tiny_qwen2, target_modules=["q_proj"], use_dora=True)]
    for recipe in planned(tiny_qwen2, *adapters).recipes:
        if recipe.updates:
            rows, columns = matrix(recipe.shape)
            updates = [replace(update, first_row=20) for update in recipe.updates]
            part = replace(recipe, shape=(rows - 20, columns), first_row=20, updates=tuple(updates))
            assert torch.equal(applied(part, rows - 20), applied(recipe, rows)[20:])


def test_experts_of_one_layer_share_what_is_read(tiny_qwen3_moe, make_adapter, planned, monkeypatch):
    adapter = make_adapter(tiny_qwen3_moe, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    read = []
    whole = Inputs.tensor
    monkeypatch.setattr(Inputs, "tensor", lambda self, one: read.append(one.name) or whole(self, one))
    with Inputs() as inputs:
        for recipe in planned(tiny_qwen3_moe, adapter).recipes:
            for update in recipe.updates:
                update.open(inputs, None)
    assert len(read) == len(set(read)) == 8  # A and B of two parameters in two layers; each has four experts


def applied(recipe, rows):
    with Inputs() as inputs:
        changes = open_updates(recipe, inputs)
        first = recipe.first_row
        values = recipe.base.open(inputs)(first, first + rows).to(torch.float32, copy=True)
        for change in changes:
            values = change(0, values)
        return values


def delta(adapter, path):
    tensors = load_file(adapter / "adapter_model.safetensors")
    return (
        tensors[f"base_model.model.{path}.lora_B.weight"] @ tensors[f"base_model.model.{path}.lora_A.weight"]
    )


def test_a_product_has_the_same_bits_however_its_factors_lie_in_memory():
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(8, 768, generator=random), torch.randn(2304, 8, generator=random)
    whole = (b @ a).T * 3
    for rows in (1, 2, 3, 5, 7, 768):
        product = Product(a.T, b.T, 3)
        parts = [product.rows(at, min(at + rows, 768)).clone() for at in range(0, 768, rows)]
        assert torch.equal(torch.cat(parts), whole)
