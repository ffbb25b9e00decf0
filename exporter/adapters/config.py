"""adapter_config.json of peft: which kinds of adapter can be merged, and with which scaling.

Every key that peft 0.21 writes for LoRA is known here. A key that is not, with a value, belongs to something
newer whose arithmetic nobody here knows: it is refused, never passed over.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite, sqrt
from typing import Any

from exporter.errors import BadAdapter

KIND = "LORA"
DEFAULT_RANK = DEFAULT_ALPHA = 8  # peft's own, for what a config leaves out

_MERGED = frozenset({
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "bias", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters",
    "ensure_weight_tying", "init_lora_weights",
})  # fmt: skip
# Where, when and how it was trained: the tensors themselves say which layers there are.
_INFORMATIONAL = frozenset({
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
    # of trainers other than peft's own
    "lora_dtype", "lorap_emb_lr", "lorap_lr_ratio",
})  # fmt: skip
_VARIANTS = {
    "alora_invocation_tokens": "aLoRA, which is switched on within a text",
    "arrow_config": "Arrow, which chooses between adapters for every token",
    "kasa_config": "KaSA, which changed the base when it was initialised",
    "layer_replication": "layer replication, which repeats layers of the base",
    "megatron_config": "LoRA on Megatron's parallel layers",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "use_qalora": "QA-LoRA",
    "velora_config": "VeLoRA",
}
# They took a part out of the base and began with it; what was learned only fits what was left.
_CHANGED_THE_BASE = {
    "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA",
}  # fmt: skip
_INITIALISATIONS = frozenset({"gaussian", "eva", "orthogonal", "true", "false"})
_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})
_SHOWN = 80  # characters of a wrong value


def check(source: str, config: Mapping[str, Any]) -> None:
    """Raises BadAdapter for a kind of adapter that cannot be merged into weights, or not exactly."""
    kind = config.get("peft_type")
    if not isinstance(kind, str) or kind.upper() != KIND:
        named = f"it is of peft_type {kind}" if kind else "adapter_config.json names no peft_type"
        raise BadAdapter(
            source,
            f"{named}. LoRA is merged, with rsLoRA and DoRA; other kinds are not: merge it with the library "
            "it was trained with, and give the result as --base.",
        )
    for key, value in config.items():
        if not any(value is empty or value == empty for empty in _EMPTY):
            _check_key(source, key)
    _check_initialisation(source, config.get("init_lora_weights", True))
    _check_numbers(source, config)
    _check_types(source, config)


def _check_key(source: str, key: str) -> None:
    if key in _VARIANTS:
        raise BadAdapter(
            source,
            f"it uses {_VARIANTS[key]} ({key} in adapter_config.json), which cannot be merged into the "
            "weights as LoRA is. Serve it with the library it was trained with.",
        )
    if key not in _MERGED | _INFORMATIONAL:
        raise BadAdapter(
            source,
            f"adapter_config.json sets {key}, which is not known here: merging might leave out what it does. "
            "A newer snugfit may know it. If you know that it does not change the weights, delete the key.",
        )


def _check_initialisation(source: str, value: Any) -> None:
    name = str(value).lower()
    for prefix, method in _CHANGED_THE_BASE.items():
        if name.startswith(prefix):
            raise BadAdapter(
                source,
                f"it was initialised with {method} (init_lora_weights), which changed the base's weights: "
                "merged into the base as published it gives a broken model. Save it again as a plain LoRA, "
                "with peft's save_pretrained(…, path_initial_model_for_weight_conversion=…); or save the "
                "changed base too, give that as --base, and set init_lora_weights to true.",
            )
    if name not in _INITIALISATIONS:
        raise BadAdapter(
            source,
            f"init_lora_weights is {value!r}, which is not known here: some ways to initialise a LoRA change "
            "the base. If this one does not, set it to true.",
        )


def _check_numbers(source: str, config: Mapping[str, Any]) -> None:
    _check_number(source, "r", config.get("r", DEFAULT_RANK), is_rank=True)
    _check_number(source, "lora_alpha", config.get("lora_alpha", DEFAULT_ALPHA))
    for key, is_rank in (("rank_pattern", True), ("alpha_pattern", False)):
        patterns = config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise _wrong(source, key, patterns, "an object of patterns with a number each")
        for pattern, value in patterns.items():
            _check_number(source, f"{key}[{pattern!r}]", value, is_rank)
            try:
                re.compile(pattern)
            except re.error as err:
                raise BadAdapter(source, f"{key}: {pattern!r} is no regular expression ({err}).") from None


def _check_number(source: str, key: str, value: Any, is_rank: bool = False) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if not is_number or (is_rank and (value < 1 or value != int(value))):
        raise _wrong(source, key, value, "a whole number from 1" if is_rank else "a number")


def _is_finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # JSON knows whole numbers of any length
        return False


def _check_types(source: str, config: Mapping[str, Any]) -> None:
    for key in ("use_rslora", "use_dora", "fan_in_fan_out", "ensure_weight_tying"):
        if (value := config.get(key)) not in (None, True, False):
            raise _wrong(source, key, value, "true or false")
    for key in ("modules_to_save", "target_parameters"):
        if (value := config.get(key)) is not None and not _is_list_of(value, str):
            raise _wrong(source, key, value, "a list of names")
    value = config.get("trainable_token_indices")
    lists = value.values() if isinstance(value, Mapping) else (value,)
    if value is not None and not all(_is_list_of(rows, int) for rows in lists):
        raise _wrong(source, "trainable_token_indices", value, "a list of rows, or an object of such lists")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def _wrong(source: str, key: str, value: Any, wanted: str) -> BadAdapter:
    text = repr(value)
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return BadAdapter(source, f"{key} in adapter_config.json is {shown}; it must be {wanted}.")


# The arithmetic that it asks for


def rank(config: Mapping[str, Any], path: str) -> int:
    """The rank of the layer at that path, as peft looks it up: rank_pattern, else r."""
    return int(_by_pattern(config.get("rank_pattern"), path, config.get("r", DEFAULT_RANK)))


def scaling(config: Mapping[str, Any], path: str) -> float:
    """What B @ A is multiplied with: alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732)."""
    alpha = float(_by_pattern(config.get("alpha_pattern"), path, config.get("lora_alpha", DEFAULT_ALPHA)))
    of_rank = rank(config, path)
    return alpha / sqrt(of_rank) if config.get("use_rslora") else alpha / of_rank


def kind(config: Mapping[str, Any]) -> str:
    """ "rsLoRA, r=16, alpha=32" for people."""
    name = "DoRA" if config.get("use_dora") else "LoRA"
    name = f"rs{name}" if config.get("use_rslora") else name
    alpha = config.get("lora_alpha", DEFAULT_ALPHA)
    return f"{name}, r={config.get('r', DEFAULT_RANK)}, alpha={alpha:g}"


def _by_pattern(patterns: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    """The first pattern that matches the path's end at a dot, as peft's get_pattern_key."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def is_trained_whole(config: Mapping[str, Any], path: str) -> bool:
    """Whether a module is listed in modules_to_save, which peft compares with the ends of paths."""
    return any(path.endswith(str(name)) for name in config.get("modules_to_save") or ())


def targets_parameter(config: Mapping[str, Any], path: str) -> bool:
    """Whether a parameter ("model.layers.0.mlp.experts.down_proj") is listed in target_parameters."""
    return any(
        path == name or path.endswith(f".{name}") for name in map(str, config.get("target_parameters") or ())
    )


def token_rows(config: Mapping[str, Any], path: str) -> tuple[int, ...] | None:
    """The rows that trainable_token_indices names for the matrix at that path; None where it names none.

    A list is meant for the input embedding, whatever its path; an object names matrices by the ends of
    their paths.
    """
    rows = config.get("trainable_token_indices")
    if isinstance(rows, Mapping):
        rows = next(
            (found for name, found in rows.items() if path == name or path.endswith(f".{name}")), None
        )
    return tuple(rows) if isinstance(rows, list) and all(isinstance(row, int) for row in rows) else None
