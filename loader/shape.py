"""One model's numbers, read from config.json the way its family reads them. No torch, no transformers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

from loader.checkpoint import ModelSpec
from loader.errors import UnsupportedModel
from loader.families import FAMILIES, FULL, LINEAR, SLIDING, Config, Family, family_of

LAYER_TYPES = {
    "full_attention": FULL,
    "sliding_attention": SLIDING,
    "conv": LINEAR,
    "linear_attention": LINEAR,
}
# Other names that older or unlisted configurations give the same number.
ALIASES = {
    "hidden_size": ("n_embd", "d_model", "dim"),
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "intermediate_size": ("n_inner", "ffn_dim", "ffn_hidden_size"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_k", "moe_top_k"),
}


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of one model, as its family reads them from config.json."""

    family: str
    exact: bool  # False: the family is not in the table
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    intermediate: int  # of a dense MLP
    vocab: int
    max_context: int
    tied: bool  # lm_head is the embedding
    layer_kinds: tuple[str, ...]  # FULL | SLIDING | LINEAR, a layer each
    window: int | None  # tokens that a sliding layer sees
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    dense_layers: int = 0  # layers with a dense MLP; all of them when there are no experts
    conv_width: int = 0  # tokens that a convolution keeps, of
    conv_channels: int = 0
    linear_width: int = 0  # values of a linear attention with a recurrent state, of
    recurrent_size: int = 0  # float32 elements

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def rope_tables(self) -> int:
        """One, or in some families one for each kind of layer that the model has."""
        return min(family_of(self.family).rope_tables, len(set(self.layer_kinds)))


def describe(spec: ModelSpec) -> Shape:
    """Read the model's numbers; UnsupportedModel when config.json lacks one that has no default, or holds
    something else in its place."""
    try:
        return _describe(spec)
    except (TypeError, AttributeError, ValueError, LookupError) as err:
        reason = f"a value in config.json is not of the kind it should be ({err})"
        raise UnsupportedModel(spec.source, spec.model_type, reason) from err


def _describe(spec: ModelSpec) -> Shape:
    family = family_of(spec.model_type)
    config = _Settings(spec, family)
    heads, hidden = config.number("num_attention_heads"), config.number("hidden_size")
    head_dim = config.number_or("head_dim", hidden // heads)
    layers = config.number("num_hidden_layers")
    if spec.tensors and layers > len(spec.tensors):
        raise ValueError(f"num_hidden_layers is {layers:,}, and there are {len(spec.tensors):,} tensors")
    kinds = _layer_kinds(config.values, family, layers)
    experts = config.number_or(family.experts, 0)
    return Shape(
        family=spec.model_type,
        exact=spec.model_type in FAMILIES,
        hidden=hidden,
        heads=heads,
        kv_heads=config.number_or("num_key_value_heads", heads),
        head_dim=head_dim,
        rotary_dim=int(head_dim * _rotary_share(config)),
        intermediate=_intermediate(config, hidden),
        vocab=config.number("vocab_size"),
        max_context=config.number("max_position_embeddings"),
        tied=config.flag("tie_embedding" if "tie_embedding" in config.values else "tie_word_embeddings"),
        layer_kinds=kinds,
        window=config.get("sliding_window") if SLIDING in kinds else None,
        experts=experts,
        experts_per_token=config.number("num_experts_per_tok") if experts else 0,
        expert_intermediate=_expert_intermediate(config, family) if experts else 0,
        dense_layers=_dense_layers(config, len(kinds)) if experts else len(kinds),
        **_linear_sizes(config, hidden),
    )


@dataclass(frozen=True)
class _Settings:
    """config.json over the family's defaults; of a model with several parts, the text's."""

    spec: ModelSpec
    family: Family
    values: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        given = {**self.spec.config, **(self.spec.config.get("text_config") or {})}
        stated = {key: value for key, value in given.items() if value is not None or key == "sliding_window"}
        # transformers 5 saves a Qwen3-MoE's num_experts as num_local_experts: no default may hide that.
        renamed = {key for key, aliases in ALIASES.items() if any(alias in stated for alias in aliases)}
        defaults = {key: value for key, value in self.family.defaults.items() if key not in renamed}
        object.__setattr__(self, "values", {**defaults, **stated})

    def get(self, key: str, default: Any = None) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def flag(self, key: str) -> bool:
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise TypeError(f"{key} is {value!r}, not true or false")
        return value

    def number_or(self, key: str, default: int) -> int:
        for name in (key, *ALIASES.get(key, ())):
            value = self.get(name)
            if isinstance(value, int) and value > 0:
                return value
            if isinstance(value, str):
                self._refuse(f"config.json has no usable {name!r}: it is {value!r}, not a number")
        return default

    def number(self, key: str) -> int:
        if found := self.number_or(key, 0):
            return found
        self._refuse(f"config.json has no usable {key!r}, and without it its size cannot be told")

    def _refuse(self, reason: str) -> NoReturn:
        raise UnsupportedModel(self.spec.source, self.spec.model_type, reason)


def _layer_kinds(config: Config, family: Family, count: int) -> tuple[str, ...]:
    named = config.get("layer_types")
    if named:
        return tuple(LAYER_TYPES.get(name, FULL) for name in named[:count])
    return tuple(family.layers(config, count))


def _rotary_share(config: _Settings) -> float:
    """`partial_rotary_factor` stands in rope_parameters (transformers 5), in rope_scaling or by itself."""
    for place in ("rope_parameters", "rope_scaling"):
        value = config.get(place, {}).get("partial_rotary_factor")
        if value is not None:
            return float(value)
    return float(config.get("partial_rotary_factor", 1.0))


def _intermediate(config: _Settings, hidden: int) -> int:
    width = config.number_or("block_ff_dim", config.number_or("intermediate_size", 4 * hidden))
    if not config.get("block_auto_adjust_ff_dim"):
        return width
    # Lfm2MLP: two thirds, times a factor, rounded up to a multiple.
    width = int(config.get("block_ffn_dim_multiplier") * int(2 * width / 3))
    multiple = config.number("block_multiple_of")
    return multiple * -(-width // multiple)


def _expert_intermediate(config: _Settings, family: Family) -> int:
    """An unlisted family's experts may be as wide as its dense MLPs."""
    return config.number_or(family.expert_width, 0) or config.number("intermediate_size")


def _linear_sizes(config: _Settings, hidden: int) -> dict[str, int]:
    """LFM2's short convolution over the hidden size, or a gated delta rule's sizes (Qwen3-Next and later)."""
    if "linear_num_value_heads" not in config.values:
        return {"conv_width": config.number_or("conv_L_cache", 0), "conv_channels": hidden}
    key_dim, value_dim = config.number("linear_key_head_dim"), config.number("linear_value_head_dim")
    values = config.number("linear_num_value_heads") * value_dim
    return {
        "conv_width": config.number_or("linear_conv_kernel_dim", 4),
        "conv_channels": 2 * config.number("linear_num_key_heads") * key_dim + values,
        "linear_width": values,
        "recurrent_size": values * key_dim,
    }


def _dense_layers(config: _Settings, count: int) -> int:
    listed, step = config.get("mlp_only_layers", []), config.get("decoder_sparse_step", 1)
    return sum(i in listed or (i + 1) % step != 0 for i in range(count))
