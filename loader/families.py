"""The table of model families: how config.json becomes the numbers that decide how big a model is.

Names, defaults and shapes follow the configuration and modeling files of transformers 5.23. config.json may
leave out what equals a class's default, so each family carries the defaults that count here; a test holds
every one of them against transformers itself. A family that is not in the table gets `ESTIMATE`, and its plan
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FULL, SLIDING, LINEAR = "full", "sliding", "linear"

Config = Mapping[str, Any]
LayerRule = Callable[[Config, int], Sequence[str]]


def all_full(_config: Config, count: int) -> Sequence[str]:
    return [FULL] * count


def all_windowed(config: Config, count: int) -> Sequence[str]:
    """Mistral: a window, when there is one, holds for every layer."""
    return [FULL if config.get("sliding_window") is None else SLIDING] * count


def windowed_if_used(config: Config, count: int) -> Sequence[str]:
    """Qwen3-MoE: like Mistral, but `use_sliding_window` must say so."""
    return all_windowed(config, count) if config.get("use_sliding_window") else all_full(config, count)


def windowed_above(config: Config, count: int) -> Sequence[str]:
    """Qwen2: layers from `max_window_layers` on slide, when `use_sliding_window` says so."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return all_full(config, count)
    return [SLIDING if i >= config["max_window_layers"] else FULL for i in range(count)]


def one_full_in(period: int) -> LayerRule:
    """Gemma: each `period`-th layer sees everything, those between slide."""

    def rule(config: Config, count: int) -> Sequence[str]:
        every = config.get("sliding_window_pattern") or period
        return [FULL if (i + 1) % every == 0 else SLIDING for i in range(count)]

    return rule


def full_where_listed(config: Config, count: int) -> Sequence[str]:
    """LFM2: `full_attn_idxs` are attention, the others short convolutions."""
    listed = config.get("full_attn_idxs")
    return [FULL if listed is None or i in listed else LINEAR for i in range(count)]


def windowed_without_rope(config: Config, count: int) -> Sequence[str]:
    """SmolLM3: layers without rotary positions slide, when `use_sliding_window` says so."""
    if not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return all_full(config, count)
    every = config["no_rope_layer_interval"]
    rotary = config.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(count)]
    return [FULL if rotary[i] else SLIDING for i in range(count)]


@dataclass(frozen=True)
class Family:
    """What a family does that config.json does not say."""

    defaults: Config
    layers: LayerRule = all_full
    # Live intermediate-wide tensors at the widest point of a dense MLP: act(gate) * up and the product are 3;
    # a fused gate_up stays whole beside them, 4; gelu_new holds 0.5x and pow(x, 3) too, 4; a plain gelu 2.
    mlp_tensors: int = 3
    fused_qkv: bool = False  # one projection, whose output lives as long as the attention
    qk_norm: str = ""  # "each": a norm right after its projection; "all": after all three
    layer_norm: bool = False  # LayerNorm has one kernel; RMSNorm makes float32 copies
    eager: bool = False  # attention in plain matrix products: transformers refuses sdpa for it
    rope_tables: int = 1  # gemma3 has one for each kind of layer
    scaled_embedding: bool = False  # the embedding owns a scalar buffer
    experts: str = ""  # config key of the number of experts
    expert_width: str = "moe_intermediate_size"
    float_routing: bool = False  # float32 routing weights make the experts' weighted outputs float32
    renames: tuple[tuple[str, str], ...] = ()  # checkpoint name -> module name, before anything else


def _defaults(positions: int, **others: Any) -> Config:
    return {"max_position_embeddings": positions, "tie_word_embeddings": False, **others}


_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}
_LLAMA = Family(_defaults(2048))

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "mistral": Family(_defaults(131_072, num_key_value_heads=8, sliding_window=4096), layers=all_windowed),
    "qwen2": Family(
        _defaults(32_768, num_key_value_heads=32, max_window_layers=28, **_QWEN_WINDOW), layers=windowed_above
    ),
    "qwen3": Family(
        _defaults(32_768, num_key_value_heads=32, head_dim=128, max_window_layers=28, **_QWEN_WINDOW),
        layers=windowed_above,
        qk_norm="each",
    ),
    "smollm3": Family(
        _defaults(
            32_768,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            use_sliding_window=False,
            no_rope_layer_interval=4,
        ),
        layers=windowed_without_rope,
    ),
    "starcoder2": Family(
        _defaults(4096, num_key_value_heads=2, tie_word_embeddings=True),
        layers=all_windowed,
        mlp_tensors=2,
        layer_norm=True,
    ),
    "gemma": Family(
        _defaults(8192, num_key_value_heads=16, head_dim=256, tie_word_embeddings=True),
        scaled_embedding=True,
    ),
    "gemma2": Family(
        _defaults(8192, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096),
        layers=one_full_in(2),
        eager=True,
        scaled_embedding=True,
    ),
    "gemma3_text": Family(
        _defaults(
            131_072, num_key_value_heads=4, head_dim=256, tie_word_embeddings=True, sliding_window=4096
        ),
        layers=one_full_in(6),
        qk_norm="all",
        rope_tables=2,
        scaled_embedding=True,
    ),
    "phi": Family(
        _defaults(2048, partial_rotary_factor=0.5),
        mlp_tensors=4,
        layer_norm=True,
    ),
    "phi3": Family(
        _defaults(4096, partial_rotary_factor=1.0),
        layers=all_windowed,
        mlp_tensors=4,
        fused_qkv=True,
    ),
    "mixtral": Family(
        _defaults(131_072, num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2),
        layers=all_windowed,
        experts="num_local_experts",
        expert_width="intermediate_size",
        float_routing=True,
        renames=((".block_sparse_moe.", ".mlp."),),
    ),
    "qwen3_moe": Family(
        _defaults(
            32_768,
            num_key_value_heads=4,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            **_QWEN_WINDOW,
        ),
        layers=windowed_if_used,
        qk_norm="each",
        experts="num_experts",
    ),
    "lfm2": Family(
        _defaults(
            128_000,
            num_key_value_heads=8,
            tie_word_embeddings=True,
            conv_L_cache=3,
            block_auto_adjust_ff_dim=True,
            block_multiple_of=256,
            block_ffn_dim_multiplier=1.0,
        ),
        layers=full_where_listed,
        qk_norm="each",
    ),
}

# A gated MLP and sdpa are what nearly every new family has.
ESTIMATE = Family(_defaults(2048), layers=all_windowed, qk_norm="each", experts="num_experts")


def family_of(model_type: str) -> Family:
    return FAMILIES.get(model_type, ESTIMATE)
