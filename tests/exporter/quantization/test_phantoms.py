"""exporter/quantization/phantoms.py: the biases that transformers' own classes have no place for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import gptq as writer
from benchmarks.make_model import make
from exporter.errors import BadQuantization
from exporter.quantization import base_weights
from exporter.quantization.phantoms import check_zero, phantoms
from exporter.weights import Inputs, Plain, Stored
from loader.checkpoint import read_any
from loader.files import read_header

SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 64, "num_experts": 4,
    "num_local_experts": 4, "shared_expert_intermediate_size": 16, "pad_token_id": 0,
}  # fmt: skip
SWITCHES: list[dict[str, bool]] = [
    {}, {"attention_bias": True}, {"mlp_bias": True}, {"attention_bias": False}, {"qkv_bias": False},
]  # fmt: skip
FAMILIES = [
    "llama", "granite", "smollm3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2",
    "gemma3_text", "cohere", "olmo2", "mistral", "mixtral", "phi3",
]  # fmt: skip


@dataclass(frozen=True)
class Quantized:
    """A quantized weight, as far as its name."""

    name: str
    shape: tuple[int, ...] = (1, 1)
    dtype: str = "F32"
    stored: tuple[Stored, ...] = ()

    def open(self, inputs: Inputs) -> Any:
        raise AssertionError


@pytest.mark.parametrize("family", FAMILIES)
def test_phantoms_are_the_biases_that_the_class_in_transformers_lacks(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for switches in SWITCHES:
        config = AutoConfig.for_model(family, **SMALL, **switches)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
        biases = [Quantized(f"{name}.bias") for name in linear]
        weights = [Quantized(f"{name}.weight") for name in linear] + biases
        lacking = {f"{name}.bias" for name, layer in linear.items() if layer.bias is None}
        found = phantoms(weights, {"model_type": family, **switches})
        assert {weight.name for weight in found} == lacking, switches


def test_qwen_v1_has_a_bias_in_c_attn_alone() -> None:
    names = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj")
    weights = [Quantized(f"transformer.h.0.{name}.{leaf}") for name in names for leaf in ("weight", "bias")]
    found = {weight.name for weight in phantoms(weights, {"model_type": "qwen", "no_bias": True})}
    assert found == {f"transformer.h.0.{name}.bias" for name in names[1:]}
    assert not phantoms(weights, {"model_type": "qwen", "no_bias": False})


def test_a_family_that_is_not_known_has_no_phantoms() -> None:
    weights = [Quantized("model.layers.0.mlp.up_proj.weight"), Quantized("model.layers.0.mlp.up_proj.bias")]
    assert not phantoms(weights, {"model_type": "new"})
    assert phantoms(weights, {"model_type": "qwen2"}) == weights[1:]


def test_a_bias_of_a_layer_that_is_not_quantized_is_no_phantom(tmp_path: Path) -> None:
    save_file(
        {
            "model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2),
            "model.layers.0.mlp.up_proj.bias": torch.ones(2),
        },
        tmp_path / "a.safetensors",
    )
    plain = [Plain(info.name, Stored(info, tmp_path)) for info in read_header(tmp_path / "a.safetensors")]
    assert not phantoms(plain, {"model_type": "qwen2"})


def test_a_phantom_must_be_zero(tmp_path: Path) -> None:
    save_file({"a.bias": torch.zeros(8), "b.bias": torch.tensor([0.0, 3, 1])}, tmp_path / "a.safetensors")
    zero, other = (
        Plain(info.name, Stored(info, tmp_path))
        for info in sorted(read_header(tmp_path / "a.safetensors"), key=lambda info: info.name)
    )
    with Inputs() as inputs:
        check_zero(inputs, zero)
        with pytest.raises(BadQuantization, match=r"b\.bias: 2 of its 3 values are not zero"):
            check_zero(inputs, other)


def test_the_phantoms_of_a_checkpoint_are_found(tmp_path: Path) -> None:
    options = writer.Options(group_size=32, phantom_biases=True)
    spec = read_any(writer.quantize(make("tiny", tmp_path / "model"), tmp_path / "out", options))
    found = phantoms(base_weights(spec), spec.config)
    assert len(found) == 8
    assert {weight.name.split(".")[-2] for weight in found} == {"o_proj", "gate_proj", "up_proj", "down_proj"}
    with Inputs() as inputs:
        for weight in found:
            check_zero(inputs, weight)
