"""Biases that a quantizer added: all zero, for layers that have none in the model's architecture.

AutoGPTQ gave every layer a bias; the Qwen v1 and the first Qwen2 Int4 checkpoints have them so. They are
left out of an export when they are zero. One that is not belongs to another architecture than config.json's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from exporter.errors import BadQuantization
from exporter.weights import Inputs, Plain, Weight

Config = Mapping[str, Any]

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_QKV = _ATTENTION - {"o_proj"}
_MLP = frozenset({"gate_proj", "up_proj", "down_proj"})
_NONE: frozenset[str] = frozenset()


def _switched(config: Config) -> frozenset[str]:
    return (_ATTENTION if config.get("attention_bias") else _NONE) | (
        _MLP if config.get("mlp_bias") else _NONE
    )


def _attention_switched(config: Config) -> frozenset[str]:
    return _ATTENTION if config.get("attention_bias") else _NONE


def _qwen1(config: Config) -> frozenset[str]:
    return frozenset({"c_attn"} if config.get("no_bias", True) else {"c_attn", "c_proj", "w1", "w2"})


# model_type -> the last names of its linear layers that have a bias (transformers 5.23, and Qwen's own code).
# The biases of a family that is not here are all taken for real.
_BIASED: Mapping[str, Callable[[Config], frozenset[str]]] = {
    **dict.fromkeys(("llama", "granite", "smollm3"), _switched),
    **dict.fromkeys(
        ("qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "cohere", "olmo2"), _attention_switched
    ),
    **dict.fromkeys(("mistral", "mixtral", "phi3"), lambda _config: _NONE),
    "qwen2": lambda _config: _QKV,
    "qwen2_moe": lambda config: _QKV if config.get("qkv_bias", True) else _NONE,
    "qwen": _qwen1,
}


def phantoms(weights: Sequence[Weight], config: Config) -> list[Weight]:
    """The biases of quantized layers that the architecture has no place for. None for an unknown family."""
    biased = _BIASED.get(str(config.get("model_type")))
    if biased is None:
        return []
    real = biased(config)
    quantized = {weight.name.removesuffix(".weight") for weight in weights if not isinstance(weight, Plain)}
    return [weight for weight in weights if _is_bias_of(weight.name, quantized, real)]


def _is_bias_of(name: str, quantized: set[str], real: frozenset[str]) -> bool:
    layer, _, leaf = name.rpartition(".")
    return leaf == "bias" and layer in quantized and layer.rpartition(".")[2] not in real


def check_zero(inputs: Inputs, weight: Weight) -> None:
    """Raise BadQuantization when a phantom holds anything but zeros."""
    found = weight.open(inputs)(0, weight.shape[0])
    if count := int((found != 0).sum()):
        raise BadQuantization(
            str(weight.stored[0].folder),
            f"{weight.name}: {count:,} of its {found.numel():,} values are not zero, and the architecture in "
            "config.json has no bias there. Config and weights belong to different models.",
        )
