"""Names of tensors: what older transformers called otherwise, under the name that transformers 5 saves.

Three things are mended: names that every transformers since has replaced (`LayerNorm.gamma`), checkpoints
saved from the model without its head (`h.0.…` for `transformer.h.0.…`), and the names that modules have in
memory where those in files are others. transformers 5 reverses its renaming and its fusing of experts when it
saves (`core_model_loading.revert_weight_conversion`), so files keep the names that they have on the hub, and
that vLLM and llama.cpp know: one tensor per expert, `block_sparse_moe` for Mixtral. An adapter's paths are
those of modules, whichever transformers it was trained with; by the same table they come to the same names.

The table follows `conversion_mapping.py` and the `base_model_prefix` of the classes in transformers 5.23;
importing those costs 170 MB. A test holds it to them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from exporter.errors import UnknownLayout
from exporter.weights import Weight

Config = Mapping[str, Any]
Rule = tuple[re.Pattern[str], str]  # what is found first in a name, and what stands there then


def _rules(*pairs: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple((re.compile(old), new) for old, new in pairs)


# transformers' own "legacy" list, for every model.
LEGACY = _rules(
    (r"LayerNorm\.gamma(?!\w)", "LayerNorm.weight"),
    (r"LayerNorm\.beta(?!\w)", "LayerNorm.bias"),
    (r"\.weight_g(?!\w)", ".parametrizations.weight.original0"),
    (r"\.weight_v(?!\w)", ".parametrizations.weight.original1"),
    (r"^(model\.language_model|language_model\.model)\.model(?!\w)", "model.language_model"),
)

_MIXTRAL = _rules((r"\.mlp\.", ".block_sparse_moe."))
_GRANITE = _rules(
    (r"block_sparse_moe\.experts\.gate_up_proj(?!\w)", "block_sparse_moe.input_linear.weight"),
    (r"block_sparse_moe\.experts\.down_proj(?!\w)", "block_sparse_moe.output_linear.weight"),
    (r"block_sparse_moe\.router\.weight(?!\w)", "block_sparse_moe.router.layer.weight"),
)
_LLAVA = _rules(
    (r"^model\.language_model\.", "language_model.model."),
    (r"^model\.(vision_tower|multi_modal_projector|image_newline)(?!\w)", r"\1"),
    (r"^lm_head\.", "language_model.lm_head."),
)
_QWEN2_VL = _rules((r"^model\.language_model\.", "model."), (r"^model\.visual\.", "visual."))
_WITHIN_VISION = _rules((r"^model\.(?=(embed_tokens|layers|norm)\.)", "model.language_model."))
_TEXT_ALONE = _rules((r"^model\.language_model\.", "model."))

# model_type -> from the names of transformers 5 in memory to those in files.
RENAMED: Mapping[str, tuple[Rule, ...]] = {
    "gpt_neox": _rules((r"^lm_head\.", "embed_out.")),
    "nemotron_h": _rules((r"^model\.", "backbone.")),
    "phimoe": _MIXTRAL + _rules((r"\.router\.weight(?!\w)", ".gate.weight")),
    **dict.fromkeys(("mixtral", "minimax", "minimax_m2"), _MIXTRAL),
    **dict.fromkeys(("granitemoe", "granitemoeshared", "granitemoehybrid"), _GRANITE),
    **dict.fromkeys(
        (
            "aya_vision", "gemma3", "got_ocr2", "internvl", "llava", "llava_next", "llava_next_video",
            "llava_onevision", "mistral3", "paligemma", "vipllava",
        ),
        _LLAVA,
    ),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp"), _WITHIN_VISION),
    **dict.fromkeys(("qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text", "gemma3n_text"), _TEXT_ALONE),
}  # fmt: skip

# model_type -> where the model stands in the one with a head; "model" for all others.
PREFIXES: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "bloom", "codegen", "ctrl", "dbrx", "falcon", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neo", "gptj",
            "mpt", "openai-gpt", "qwen", "xlm", "xlnet",
        ),
        "transformer",
    ),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "xlstm"), "backbone"),
    **{name: name for name in ("biogpt", "gpt_neox", "gpt_neox_japanese", "rwkv")},
}  # fmt: skip
# Prefix -> what stands right below it, in any model; none of it stands beside it.
CHILDREN: Mapping[str, frozenset[str]] = {
    "model": frozenset({
        "embed_tokens", "embedding_norm", "embeddings", "final_layernorm", "final_norm", "layer_norm",
        "layers", "norm", "norm_f",
    }),
    "transformer": frozenset({
        "attentions", "blocks", "embeddings", "ffns", "h", "layer", "layer_norm1", "layer_norm2",
        "layer_norm_emb", "layernorm", "ln_f", "mask_emb", "norm_f", "position_embeddings", "positions_embed",
        "tokens_embed", "w", "word_embedding", "word_embeddings", "word_embeddings_layernorm", "wpe", "wte",
    }),
    "backbone": frozenset({"blocks", "embeddings", "layers", "norm_f", "out_norm"}),
    "biogpt": frozenset({"embed_positions", "embed_tokens", "layer_norm", "layers"}),
    "gpt_neox": frozenset({"embed_in", "final_layer_norm", "layers"}),
    "gpt_neox_japanese": frozenset({"embed_in", "final_layer_norm", "layers"}),
    "rwkv": frozenset({"blocks", "embeddings", "ln_out"}),
}  # fmt: skip
_CHILDREN_OF_TYPE = {"opt": frozenset({"decoder"})}  # elsewhere a decoder is a head
# Their files have no prefix, or their classes are not put together that way.
UNPREFIXED = frozenset({"deepseek_v4", "llama4", "llama4_text", "mllama"})

# What older transformers saved although it is computed: positions, and masks of [1, 1, length, length].
_COMPUTED = re.compile(
    r"(.*\.)?(rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)|(attn|attention)\.masked_bias"
    r"|position_ids|logn_tensor|embed_positions\.(weights|_float_tensor)|decoder\.version)"
)
_MASK = re.compile(r"(.*\.)?(attn|attention|crossattention)\.(bias|causal_mask)")


def renamed(weights: Iterable[Weight], config: Config) -> tuple[list[Weight], list[str]]:
    """(the weights under the names that transformers 5 saves, names of those left out as computed).

    Raises UnknownLayout when two tensors would have one name.
    """
    kept: dict[str, Weight] = {}
    dropped: list[str] = []
    for weight in weights:
        if _is_computed(weight.name, weight.shape):
            dropped.append(weight.name)
            continue
        name = rename(weight.name, config)
        if name in kept:
            others = f"the base also has one that becomes {name}. Remove the one that is not meant."
            raise UnknownLayout(weight.name, others)
        kept[name] = weight
    return [_named(name, weight) for name, weight in kept.items()], dropped


def rename(name: str, config: Config) -> str:
    """The name that transformers 5 saves a tensor under, from any that some transformers gave it."""
    name = _replaced(name, LEGACY)
    model_type = str(config.get("model_type", ""))
    if name.split(".")[0] in _below_prefix(model_type):
        name = f"{PREFIXES.get(model_type, 'model')}.{name}"
    return _replaced(name, RENAMED.get(model_type, ()))


def _replaced(name: str, rules: Sequence[Rule]) -> str:
    for old, new in rules:
        name = old.sub(new, name, count=1)
    return name


def _below_prefix(model_type: str) -> frozenset[str]:
    if model_type in UNPREFIXED:
        return frozenset()
    return _CHILDREN_OF_TYPE.get(model_type, CHILDREN[PREFIXES.get(model_type, "model")])


def _is_computed(name: str, shape: tuple[int, ...]) -> bool:
    if _COMPUTED.fullmatch(name):
        return True
    return bool(_MASK.fullmatch(name)) and len(shape) == 4


def _named(name: str, weight: Weight) -> Weight:
    kept: Any = weight  # a frozen dataclass, as every Weight is
    return weight if name == weight.name else replace(kept, name=name)
