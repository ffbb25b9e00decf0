"""How many bytes a model needs: weights, KV cache, activations, logits. Arithmetic only."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from loader.activations import Forward
from loader.checkpoint import DTYPE_BYTES, ModelSpec
from loader.errors import BadPlanRequest
from loader.families import LINEAR, SLIDING, Family, family_of
from loader.packed import PackedForward
from loader.shape import Shape, describe

DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
SAFETENSORS_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# The sampler may hold this many float32 copies of a row: scores, sorted scores, their int64 indices (two),
# probabilities and their running sum; of so many rows at once. The engine's sampler keeps to it.
SAMPLER_FLOAT32_ROWS = 6
SAMPLED_AT_ONCE = 8
FLOAT32 = 4

_EXPERT = re.compile(r"\.experts\.\d+\..*$")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block)\.(\d+)\.")
_ROTARY = re.compile(r"rotary_emb\.inv_freq$")
_BARE = ("layers.", "embed_tokens.", "norm.")
# Places in a layer, in the order in which they run.
_ATTENTION = frozenset({"self_attn", "attn", "attention", "linear_attn", "conv"})
_MLP = frozenset({"mlp", "feed_forward", "ffn"})
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})
_STAGES = ("embed", "buffer", "layer", "norm", "head")


@dataclass(frozen=True, slots=True)
class WeightUnit:
    """The parameters and buffers that one module of the built model owns."""

    module: str  # name in the transformers model: "model.layers.0.mlp.gate_proj"
    kind: str  # "embed" | "attention" | "mlp" | "norm" | "head" | "buffer" | "other"
    layer: int | None
    n_bytes: int  # in the dtype it is loaded in; a tied head has 0 (or its bias)
    tied_to: str | None = None  # module that owns the tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one decoder layer keeps per sequence."""

    kind: str  # "full" | "sliding" | "linear"
    bytes_per_token: int  # KV bytes of one token (0 for linear)
    window: int | None = None  # tokens kept by a sliding layer
    state_bytes: int = 0  # constant bytes per sequence of a linear layer

    def n_bytes(self, context: int, chunk: int) -> int:
        """Bytes for one sequence; a sliding layer keeps its window and the chunk that is being read."""
        tokens = context if self.window is None else min(context, self.window + chunk)
        return self.bytes_per_token * tokens + self.state_bytes


@dataclass(frozen=True)
class Footprint:
    """Everything that make_plan needs to know about a model's size. No torch behind it."""

    shape: Shape
    dtype: str  # "bfloat16" | "float16" | "float32"
    units: tuple[WeightUnit, ...]  # in execution order
    layers: tuple[LayerCache, ...]

    @property
    def family(self) -> str:
        return self.shape.family

    @property
    def exact(self) -> bool:
        """False: an unlisted family, the figures are an estimate and labelled so."""
        return self.shape.exact

    @property
    def vocab_size(self) -> int:
        return self.shape.vocab

    @property
    def max_context(self) -> int:
        return self.shape.max_context

    @property
    def dtype_bytes(self) -> int:
        return DTYPES[self.dtype]

    @cached_property
    def weights_bytes(self) -> int:
        """Parameters and buffers, each once."""
        return sum(unit.n_bytes for unit in self.units)

    @cached_property
    def kv_bytes_per_token(self) -> int:
        """What one more token costs when the sequence is longer than every window."""
        return sum(layer.bytes_per_token for layer in self.layers if layer.window is None)

    def kv_bytes(self, context: int, chunk: int) -> int:
        """Cache and states of one sequence of `context` tokens that is read `chunk` tokens at a time."""
        return sum(layer.n_bytes(context, chunk) for layer in self.layers)

    def activation_bytes(self, chunk: int, context: int, gpu: bool = False) -> int:
        """The worst moment of reading the last `chunk` of `context` tokens; no weights, cache or logits."""
        tokens = min(chunk, context)
        return Forward(self.shape, self.dtype_bytes, tokens, context, gpu).peak_bytes()

    def packed_activation_bytes(
        self, chunk: int, context: int, rows: int, block_tokens: int, gpu: bool = False
    ) -> int:
        """The worst moment of a step of `chunk` tokens from `rows` sequences that have up to `context`."""
        step = PackedForward(self.shape, self.dtype_bytes, chunk, context, gpu, rows, block_tokens)
        return step.peak_bytes()

    def graph_bytes(self, rows: int, context: int, block_tokens: int) -> int:
        """What CUDA graphs of single tokens of up to `rows` sequences keep: a step, and its logits twice."""
        sizes = (rows, context, True, rows, block_tokens)
        step = PackedForward(self.shape, self.dtype_bytes, *sizes, paged=True)
        return step.peak_bytes() + 2 * rows * self.vocab_size * self.dtype_bytes

    def logits_bytes(self, rows: int) -> int:
        """The hidden states of `rows` tokens, their logits, and the sampler's copies of a few of them."""
        copies = min(rows, SAMPLED_AT_ONCE) * SAMPLER_FLOAT32_ROWS * FLOAT32
        return rows * (self.shape.hidden + self.vocab_size) * self.dtype_bytes + copies * self.vocab_size


def measure(spec: ModelSpec, dtype: str = "auto") -> Footprint:
    """Count a model's bytes from its config and headers.

    Raises UnsupportedModel when config.json lacks a number, BadPlanRequest for a dtype that is not one of
    DTYPES.
    """
    shape = describe(spec)
    chosen = choose_dtype(spec, dtype)
    units = weight_units(spec, shape, DTYPES[chosen])
    layers = tuple(_layer_cache(shape, kind, DTYPES[chosen]) for kind in shape.layer_kinds)
    return Footprint(shape, chosen, units, layers)


def choose_dtype(spec: ModelSpec, dtype: str) -> str:
    """The dtype asked for; "auto" is config.json's, else that of most bytes."""
    if dtype in DTYPES:
        return dtype
    if dtype != "auto":
        raise BadPlanRequest(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    stated = str(spec.config.get("dtype") or spec.config.get("torch_dtype")).removeprefix("torch.")
    return stated if stated in DTYPES else _commonest_dtype(spec)


def _commonest_dtype(spec: ModelSpec) -> str:
    amounts = Counter[str]()
    for tensor in spec.tensors:
        if tensor.dtype in SAFETENSORS_DTYPES:
            amounts[SAFETENSORS_DTYPES[tensor.dtype]] += tensor.n_bytes
    return amounts.most_common(1)[0][0] if amounts else "float32"


def weight_units(spec: ModelSpec, shape: Shape, dtype_bytes: int) -> tuple[WeightUnit, ...]:
    """A unit for every module of the built model that owns parameters or buffers, in execution order."""
    family = family_of(shape.family)
    amounts = _parameter_bytes(spec, family, dtype_bytes)
    embedding = next((name for name in amounts if _is_embedding(name)), None)
    head = "lm_head"
    if shape.tied:
        embedding = embedding or "model.embed_tokens"
        matrix = shape.vocab * shape.hidden * dtype_bytes
        # Whichever of the two names the file has, or both: one matrix, under the embedding's name. A bias of
        # the head is its own, with or without the matrix beside it.
        bias = amounts.get(head, 0) % matrix
        amounts.setdefault(embedding, matrix)
        amounts[head] = bias
    if family.scaled_embedding and embedding:
        amounts[embedding] += dtype_bytes
    if shape.rotary_dim:
        # inv_freq and original_inv_freq, in float32 whatever the dtype.
        amounts["model.rotary_emb"] = shape.rope_tables * 2 * (shape.rotary_dim // 2) * FLOAT32
    owners = _owners_with_children(amounts)
    units = [
        _unit(name, n_bytes, embedding if shape.tied and name == head else None, owners)
        for name, n_bytes in amounts.items()
    ]
    return tuple(sorted(units, key=_execution_order))


def _parameter_bytes(spec: ModelSpec, family: Family, dtype_bytes: int) -> dict[str, int]:
    """Bytes in the loading dtype by module name; checkpoint names become those of the built model."""
    bare = any(t.name.startswith(_BARE) for t in spec.tensors)
    amounts: dict[str, int] = {}
    for tensor in spec.tensors:
        if _ROTARY.search(tensor.name):
            continue  # old Llama checkpoints hold the table that the model makes itself
        name = module_name(tensor.name, family, bare)
        size = dtype_bytes if tensor.dtype in FLOATS else DTYPE_BYTES[tensor.dtype]
        amounts[name] = amounts.get(name, 0) + _count(tensor.shape) * size
    return amounts


def module_name(tensor: str, family: Family, bare: bool = False) -> str:
    """The module of the built model that owns a checkpoint's tensor.

    Experts that a checkpoint stores one by one are one module in transformers 5 (conversion_mapping.py).
    `bare`: the names lack the prefix of the causal language model, as a saved base model's do.
    """
    for old, new in family.renames:
        tensor = tensor.replace(old, new)
    if bare and tensor.startswith(_BARE):
        tensor = f"model.{tensor}"
    if _EXPERT.search(tensor):
        return _EXPERT.sub(".experts", tensor)
    return tensor.rpartition(".")[0]


def _count(dims: tuple[int, ...]) -> int:
    total = 1
    for dim in dims:
        total *= dim
    return total


def _is_embedding(module: str) -> bool:
    return module.rpartition(".")[2] in (
        "embed_tokens",
        "wte",
        "embed_in",
        "word_embeddings",
        "tok_embeddings",
    )


def _owners_with_children(modules: dict[str, int]) -> tuple[str, ...]:
    """Modules that own tensors and hold others that do: accelerate's hooks take those as one piece."""
    prefixes = {name[: m.start()] for name in modules for m in re.finditer(r"\.", name)}
    return tuple(f"{name}." for name in modules if name in prefixes)


def _unit(module: str, n_bytes: int, tied_to: str | None, owners: tuple[str, ...]) -> WeightUnit:
    found = _LAYER.search(module)
    kind = _kind(module)
    if kind in ("attention", "mlp") and (module.startswith(owners) or f"{module}." in owners):
        kind = "other"
    return WeightUnit(module, kind, int(found.group(1)) if found else None, n_bytes, tied_to)


def _kind(module: str) -> str:
    parts = module.split(".")
    last, inside = parts[-1], set(parts[:-1])
    if _is_embedding(module):
        return "embed"
    if last in ("lm_head", "embed_out", "output"):
        return "head"
    if "norm" in last or last.startswith("ln_"):
        return "norm"
    if last == "rotary_emb":
        return "buffer"
    # Convolutions read their child's weight themselves, and routers are tiny: neither is worth moving about.
    if last in _ROUTERS or last.startswith("conv"):
        return "other"
    if inside & _MLP:
        return "mlp"
    return "attention" if inside & _ATTENTION else "other"


def _execution_order(unit: WeightUnit) -> tuple[int, int, int]:
    if unit.layer is not None:
        return _STAGES.index("layer"), unit.layer, _place_in_layer(unit)
    stage = unit.kind if unit.kind in _STAGES else "buffer"
    return _STAGES.index(stage), 0, 0


def _place_in_layer(unit: WeightUnit) -> int:
    parts = set(unit.module.split("."))
    if parts & _MLP:
        return 3
    if parts & _ATTENTION:
        return 1
    return 0 if "input" in unit.module or "operator" in unit.module else 2


def _layer_cache(shape: Shape, kind: str, dtype_bytes: int) -> LayerCache:
    if kind == LINEAR:
        convolved = shape.conv_channels * shape.conv_width * dtype_bytes
        return LayerCache(kind, 0, state_bytes=convolved + shape.recurrent_size * FLOAT32)
    window = shape.window if kind == SLIDING else None
    return LayerCache(kind, 2 * shape.kv_width * dtype_bytes, window)
