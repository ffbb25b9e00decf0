"""Whether many requests may share one forward, decided from config.json and transformers' source text.

A batch of them is one packed sequence, and the keys and values of each request are in blocks that the engine
hands out. So a model is batched where all that it keeps of a token are one key and one value for each layer,
and where every attention goes through transformers' `AttentionInterface`, behind which the engine has its
own. Any other model runs one request at a time with the cache that transformers made for it. Where it cannot
be told, it is one at a time too: slow, but right.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from loader.architectures import modeling_source
from loader.checkpoint import ModelSpec
from loader.families import FAMILIES, LINEAR
from loader.shape import LAYER_TYPES, Shape

CONTINUOUS, ONE_AT_A_TIME = "continuous", "one at a time"

# What modeling files call the things that a key and a value in a block do not hold. A family of the table is
# known not to have them, but its file may, for its relatives.
_OTHER_WAYS = {
    "compresses keys and values (MLA)": r"kv_lora_rank|v_head_dim",
    "has attention sinks": r"\bs_aux\b|\bsinks\b",
    "shares keys and values between layers": r"kv_shared|shared_kv",
    "attends in fixed chunks": r"chunked_causal|attention_chunk",
    "keeps a state instead of keys and values": r"conv_state|[Mm]amba|\bssm_|[Ll]inear_?[Aa]ttention",
    "picks the keys that are seen": r"\bindexer\b|compressor|dynamic_mask",
    "has attention that is not causal": r"is_causal = False|use_bidirectional|[Cc]ross_?[Aa]tt",
    "adds a bias to its scores": r"position_bias|alibi",
    "caps its scores": r"attn_logit_softcapping|softcap=",
    "has attention of a kind of its own": r"lambda_init|MoA\b|heads_per_layer",
    "runs its layers more than once for a token": r"num_layers_per_stack|num_loops",
}


def why_one_at_a_time(spec: ModelSpec, shape: Shape, context: int) -> str | None:
    """What keeps requests of `context` tokens out of one batch, after the family's name; None: nothing."""
    config = {**spec.config, **(spec.config.get("text_config") or {})}
    return _layers(config, shape) or _positions(config, context) or _unlisted(spec, config)


def _layers(config: dict[str, Any], shape: Shape) -> str | None:
    if LINEAR in shape.layer_kinds:
        return f"has {'linear-attention' if shape.linear_width else 'convolution'} layers"
    if config.get("kv_lora_rank"):
        return "compresses keys and values (MLA)"
    others = sorted({str(name) for name in config.get("layer_types") or ()} - LAYER_TYPES.keys())
    if others:
        return f"has layers of another kind ({', '.join(others)})"
    if config.get("use_bidirectional_attention"):
        return "has attention that is not causal"
    return None


def _positions(config: dict[str, Any], context: int) -> str | None:
    """longrope turns all positions of a batch by what its longest sequence needs (modeling_rope_utils.py)."""
    rope: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    if (rope.get("rope_type") or rope.get("type")) != "longrope":
        return None
    short = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if not isinstance(short, int):
        return "has positions that change with the longest sequence of a batch"
    if context <= short:
        return None
    return f"has other positions beyond {short:,} tokens (--context {short} or less runs requests together)"


def _unlisted(spec: ModelSpec, config: dict[str, Any]) -> str | None:
    if spec.model_type in FAMILIES:
        return None
    if spec.config.get("text_config"):
        return "is the text part of a larger model"
    if config.get("sliding_window") and not config.get("layer_types"):
        return "does not say in config.json which of its layers have the window"
    return _read(spec.model_type)


@cache
def _read(model_type: str) -> str | None:
    """What the modeling file of an unlisted family says."""
    source = modeling_source(model_type)
    if "_supports_attention_backend = True" not in source or "ALL_ATTENTION_FUNCTIONS" not in source:
        return "has no exchangeable attention"
    return next((reason for reason, words in _OTHER_WAYS.items() if re.search(words, source)), None)
