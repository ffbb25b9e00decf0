"""config.json of the output: the base's, with what an export changes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

DTYPE = "bfloat16"

_QUANTIZATION = ("quantization_config", "compression_config", "_pre_quantization_dtype")
_LOCAL = ("_name_or_path", "_commit_hash")  # where the base lay on somebody's disk
_FLOATS = frozenset({"float16", "float32", "float64", "bfloat16", "auto", None})
# Where models with more than one modality describe the language model.
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
# What is true of the language model is said there too.
_OF_TEXT = ("vocab_size", "tie_word_embeddings")


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """A configuration file: indented by 2, keys in their order, ASCII only, a newline at the end."""
    return (json.dumps(content, indent=2) + "\n").encode()


def output_config(
    base: Mapping[str, Any], changes: Mapping[str, Any], keep_remote_code: bool = False
) -> dict[str, Any]:
    """config.json of the output from the base's, whose order of keys it keeps.

    Nothing in it says quantized any more, at any depth; every float dtype is bfloat16, under the key `dtype`
    as transformers 5 writes it. `changes` go on top; `vocab_size` and `tie_word_embeddings` also into the
    nested config of a language model, where there is one. `auto_map` goes, so that nobody is asked to run
    code of the base, unless `keep_remote_code` says that transformers does not know the architecture.
    """
    dropped = {*_QUANTIZATION, *_LOCAL} | (set() if keep_remote_code else {"auto_map"})
    config = _cleaned(base, dropped)
    config["dtype"] = DTYPE
    for key, value in changes.items():
        holders = list(text_configs(config)) if key in _OF_TEXT else []
        for holder in holders:
            holder[key] = value
        if key != "vocab_size" or not holders or key in config:
            config[key] = value
    return config


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Those that a config.json names; none where it names them in no form that can be read."""
    found = config.get("architectures")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _cleaned(config: Mapping[str, Any], dropped: Iterable[str]) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    for key, value in config.items():
        if key in dropped:
            continue
        if key in ("dtype", "torch_dtype") and _is_float_dtype(value):
            cleaned["dtype"] = DTYPE
        else:
            cleaned[key] = _cleaned(value, dropped) if isinstance(value, Mapping) else value
    return cleaned


def _is_float_dtype(value: object) -> bool:
    return value is None or (isinstance(value, str) and value.removeprefix("torch.") in _FLOATS)


def text_configs(config: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The nested descriptions of language models in a config.json; none where it describes just one."""
    for name in _TEXT_CONFIGS:
        nested = config.get(name)
        if isinstance(nested, dict):
            inner = list(text_configs(nested))
            yield from inner or [nested]
