"""How many bytes a model needs: weights, KV cache, activations, logits. Arithmetic only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightUnit:
    """The parameters (or buffers) that one leaf module of the built model owns."""

    module: str  # name in the transformers model: "model.layers.0.mlp.gate_proj"
    kind: str  # "embed" | "attention" | "mlp" | "norm" | "head" | "buffer" | "other"
    layer: int | None
    n_bytes: int  # in the dtype it is loaded in; a tied head has 0
    tied_to: str | None = None  # module that owns the tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one decoder layer keeps per sequence."""

    kind: str  # "full" | "sliding" | "linear"
    bytes_per_token: int  # KV bytes of one token (0 for linear)
    window: int | None = None  # tokens kept by a sliding layer
    state_bytes: int = 0  # constant bytes per sequence of a linear layer


@dataclass(frozen=True)
class Footprint:
    """Everything that make_plan needs to know about a model's size. No torch behind it."""

    family: str
    exact: bool  # False: an unlisted family, the figures are an estimate and labelled so
    dtype: str  # "bfloat16" | "float16" | "float32"
    units: tuple[WeightUnit, ...]  # in execution order
    layers: tuple[LayerCache, ...]
    vocab_size: int
    max_context: int
    activation_bytes_per_token: int  # of a prefill chunk, at its peak, without what grows with context

    # (filled in by the owner: weights_bytes, kv_bytes_per_token, kv_bytes(context, chunk), activation_bytes(chunk, context), logits_bytes(rows))
