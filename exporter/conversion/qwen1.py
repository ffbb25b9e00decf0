"""Qwen v1 becomes Qwen2: the same arithmetic under other names, in a class that transformers has.

Qwen v1 (QwenLM's modeling_qwen.py) came with code of its own, which transformers never took over. Its decoder
is Qwen2's: RMSNorm, rotary positions over both halves of a head, biases on q, k and v only, a gated MLP whose
gate is the second matrix (`w1(x) * silu(w2(x))`). q, k and v are one matrix there, whose rows are cut here,
and with them whatever an adapter does to them.

Not carried over: dynamic NTK and log-n scaling, which Qwen v1 turns on in texts longer than `seq_length`, and
which does nothing below. So `max_position_embeddings` of the output is `seq_length`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from exporter.errors import UnknownLayout
from exporter.recipe import Recipe, Update
from exporter.weights import Weight, matrix

MODEL_TYPE, ARCHITECTURE = "qwen", "QWenLMHeadModel"
END_OF_TEXT = 151_643  # <|im_start|> and <|im_end|> follow

_RENAMED = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_LAYER = {
    "ln_1.weight": ("input_layernorm.weight",),
    "attn.c_attn.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "attn.c_attn.bias": tuple(f"self_attn.{name}_proj.bias" for name in "qkv"),
    "attn.c_proj.weight": ("self_attn.o_proj.weight",),
    "ln_2.weight": ("post_attention_layernorm.weight",),
    "mlp.w1.weight": ("mlp.up_proj.weight",),
    "mlp.w2.weight": ("mlp.gate_proj.weight",),
    "mlp.c_proj.weight": ("mlp.down_proj.weight",),
}
# GPTQ writes them for layers that have none.
_NO_BIAS = frozenset({"attn.c_proj.bias", "mlp.w1.bias", "mlp.w2.bias", "mlp.c_proj.bias"})
_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_OTHER_SENSES = re.compile(r"transformer\.(visual|audio)\.")


def is_qwen1(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a model of Qwen v1's code; Qwen-VL and Qwen-Audio do too."""
    architectures = config.get("architectures") or [ARCHITECTURE]
    return config.get("model_type") == MODEL_TYPE and ARCHITECTURE in architectures


def convert(
    recipes: Sequence[Recipe], config: Mapping[str, Any]
) -> tuple[list[Recipe], dict[str, Any], list[Weight]]:
    """(the recipes of a Qwen2, its config.json, weights that have no place in it).

    Whoever runs the export has to see that the last are zero and refuse the base if they are not: they are
    biases that GPTQ's writers add. Raises UnknownLayout for a model that is no Qwen v1 decoder: with tensors
    that it does not know, without one that it needs, or of shapes that its config.json does not say.
    """
    output = _config(config)
    converted: list[Recipe] = []
    must_be_zero: list[Weight] = []
    for recipe in recipes:
        if names := _names(recipe.name):
            converted += _cut(recipe, names)
        else:
            must_be_zero.append(_without_place(recipe))
    shapes = {recipe.name: recipe.shape for recipe in converted}
    output["vocab_size"] = shapes.get("model.embed_tokens.weight", (output["vocab_size"],))[0]
    _check(shapes, output)
    return converted, output, must_be_zero


def generation_config(v1: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json of Qwen v1 without what only its own code reads.

    `chat` stopped by itself at the end of a turn; here that is one of the tokens that end a text.
    `max_window_size`, in tokens of history that it kept, is left to whoever serves the model.
    """
    output = {key: value for key, value in v1.items() if key not in ("chat_format", "max_window_size")}
    end = v1.get("eos_token_id")
    ends = [end] if isinstance(end, int) else list(end or [END_OF_TEXT])
    stops = output.pop("stop_words_ids", None) or []
    words = [word[0] for word in stops if isinstance(word, list) and len(word) == 1]
    if v1.get("chat_format") != "raw":
        words.insert(0, ends[0] + 2)  # <|im_end|>
    output["eos_token_id"] = list(dict.fromkeys([*words, *ends]))
    output.setdefault("pad_token_id", ends[0])
    return output


# Tensors


def _names(name: str) -> tuple[str, ...]:
    """What a tensor becomes, from its first row to its last; () for a bias that Qwen2 lacks."""
    if name in _RENAMED:
        return (_RENAMED[name],)
    match = _LAYER.fullmatch(name)
    if match and match[2] in _IN_LAYER:
        return tuple(f"model.layers.{int(match[1])}.{part}" for part in _IN_LAYER[match[2]])
    if match and match[2] in _NO_BIAS:
        return ()
    if other := _OTHER_SENSES.match(name):
        model = "Qwen-VL" if other[1] == "visual" else "Qwen-Audio"
        reason = f"this is {model}. Only language models of Qwen v1 are converted: to give up what sees or "
        raise UnknownLayout(name, f"{reason}hears would be another model.")
    raise UnknownLayout(name, "Qwen v1 has no such tensor, so it is not known what it becomes in Qwen2.")


def _cut(recipe: Recipe, names: tuple[str, ...]) -> Iterator[Recipe]:
    rows = matrix(recipe.shape)[0]
    if rows % len(names):
        reason = f"it has {rows} rows, which are not the same number for q, k and v."
        raise UnknownLayout(recipe.name, reason)
    part = rows // len(names)
    for at, name in enumerate(names):
        first = at * part
        yield replace(
            recipe,
            name=name,
            shape=(part, *recipe.shape[1:]),
            first_row=recipe.first_row + first,
            updates=tuple(_moved(update, first) for update in recipe.updates),
        )


def _moved(update: Update, rows: int) -> Update:
    moved: Any = update  # a frozen dataclass, as every Update is
    return replace(moved, first_row=update.first_row + rows) if rows else update


def _without_place(recipe: Recipe) -> Weight:
    if recipe.updates:
        adapters = ", ".join(dict.fromkeys(update.adapter for update in recipe.updates))
        reason = f"Qwen2 has no such bias, and {adapters} changes it: the change would be lost."
        raise UnknownLayout(recipe.name, reason)
    return recipe.base


def _check(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> None:
    expected = dict(_expected(config))
    if missing := [name for name in expected if name not in shapes]:
        reason = f"{len(missing)} tensors of this Qwen2 are not made by the base: it is not all of a Qwen v1."
        raise UnknownLayout(missing[0], reason)
    if more := [name for name in shapes if name not in expected]:
        reason = f"config.json says {config['num_hidden_layers']} layers and no place for it."
        raise UnknownLayout(more[0], reason)
    for name, shape in expected.items():
        if shapes[name] != shape:
            reason = (
                f"it is {list(shapes[name])}, and config.json says {list(shape)}: this base was padded or"
            )
            raise UnknownLayout(name, f"{reason} is of another size.")


def _expected(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(config["num_hidden_layers"]):
        for names in _IN_LAYER.values():
            for name in names:
                yield f"model.layers.{layer}.{name}", _shape_of(name, hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (vocabulary, hidden)


def _shape_of(name: str, hidden: int, inner: int) -> tuple[int, ...]:
    if name in ("mlp.up_proj.weight", "mlp.gate_proj.weight"):
        return inner, hidden
    if name == "mlp.down_proj.weight":
        return hidden, inner
    return (hidden,) if "layernorm" in name or name.endswith(".bias") else (hidden, hidden)


# config.json


def _config(v1: Mapping[str, Any]) -> dict[str, Any]:
    heads, hidden = _number(v1, "num_attention_heads"), _number(v1, "hidden_size")
    width = v1.get("kv_channels", hidden // heads)
    if width * heads != hidden:
        raise UnknownLayout("config.json", f"{heads} heads of {width} are not {hidden} (hidden_size).")
    if v1.get("rotary_pct", 1.0) != 1.0:
        reason = f"rotary_pct is {v1['rotary_pct']}, and Qwen2 has rotary positions in all of a head."
        raise UnknownLayout("config.json", reason)
    end = v1.get("eos_token_id")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": v1.get("attn_dropout_prob", 0.0),
        "bos_token_id": END_OF_TEXT if v1.get("bos_token_id") is None else v1["bos_token_id"],
        "dtype": "bfloat16",
        "eos_token_id": END_OF_TEXT if end is None else end,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "initializer_range": v1.get("initializer_range", 0.02),
        "intermediate_size": _number(v1, "intermediate_size") // 2,  # Qwen v1 counts both halves
        "max_position_embeddings": _number(v1, "seq_length"),
        "max_window_layers": _number(v1, "num_hidden_layers"),
        "model_type": "qwen2",
        "num_attention_heads": heads,
        "num_hidden_layers": _number(v1, "num_hidden_layers"),
        "num_key_value_heads": heads,
        "rms_norm_eps": v1.get("layer_norm_epsilon", 1e-6),
        "rope_theta": float(v1.get("rotary_emb_base", 10_000)),
        "tie_word_embeddings": bool(v1.get("tie_word_embeddings", False)),
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": _number(v1, "vocab_size"),
    }


def _number(v1: Mapping[str, Any], key: str) -> int:
    value = v1.get(key)
    if type(value) is not int or value < 1:
        raise UnknownLayout("config.json", f"{key} is {value!r}: a Qwen v1's is a number above 0.")
    return value
