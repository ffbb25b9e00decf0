"""How a checkpoint is quantized, and its weights as numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

from exporter.errors import BadQuantization
from exporter.weights import Plain, Stored, Weight
from loader.checkpoint import ModelSpec

# quant_method in config.json -> module of this package
FORMATS = {
    "gptq": "gptq", "awq": "awq", "bitsandbytes": "bnb", "compressed-tensors": "compressed", "fp8": "fp8",
    "fbgemm_fp8": "fp8",
}  # fmt: skip
# transformers keeps the weights of their layers transposed.
TRANSPOSED = frozenset({"gpt2", "openai-gpt"})
# AutoRound packs as GPTQ or as AWQ does, and says so in packing_format.
AUTO_ROUND = ("auto-round", "auto_round", "intel/auto-round")

# A tensor's last name -> the formats that have such tensors. The first is it where config.json says nothing.
_MARKS = {
    "qweight": ("gptq", "awq"), "qzeros": ("gptq", "awq"), "absmax": ("bnb",), "SCB": ("bnb",),
    "weight_packed": ("compressed",), "weight_scale_inv": ("fp8",), "weight_scale": ("fp8", "compressed"),
}  # fmt: skip
_EIGHT_BITS = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"})
_PACKED = frozenset({"F4", "F6_E2M3", "F6_E3M2", "I8", "U8", "I16", "U16", "I32", "U32"})
_WAY_OUT = "Give the model that it was made from as --base, or a copy quantized in one of these formats"


def base_weights(spec: ModelSpec) -> list[Weight]:
    """Every weight of a checkpoint as numbers, quantized or not, under its name in the checkpoint.

    Only headers are read (and the few bytes of bitsandbytes and compressed-tensors that hold shapes). Raises
    BadQuantization for what cannot be turned into numbers.
    """
    tensors = [Stored(info, spec.path) for info in spec.tensors]
    name = _format(spec, tensors)
    if name is None:
        return [Plain(tensor.name, tensor) for tensor in tensors]
    _refuse_transposed(spec, name)
    module = import_module(f"exporter.quantization.{name}")
    found: list[Weight] = module.weights(spec.source, _settings(spec), tensors)
    _refuse_twice(spec.source, found)
    return found


def _refuse_transposed(spec: ModelSpec, name: str) -> None:
    """A quantizer stores these layers as [outputs, inputs], and the 16-bit model has them the other way."""
    if spec.model_type in TRANSPOSED:
        raise BadQuantization(
            spec.source,
            f"it is a {spec.model_type} in {name}, and 16-bit ones have their weights transposed (Conv1D); "
            f"snugfit does not read that. {_WAY_OUT}.",
        )


def method(spec: ModelSpec) -> str | None:
    """ "gptq, 4 bits, groups of 128, desc_act", as config.json has it; None for one that is not quantized.

    Raises BadQuantization as `base_weights` does.
    """
    name = _format(spec, [Stored(info, spec.path) for info in spec.tensors])
    return None if name is None else ", ".join([_method_name(spec) or name, *_details(_settings(spec))])


def _details(settings: Mapping[str, Any]) -> Iterator[str]:
    bits = settings.get("bits", settings.get("w_bit"))
    bits = bits or next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
    if isinstance(bits, int):
        yield f"{bits} bits"
    if settings.get("load_in_4bit"):
        yield str(settings.get("bnb_4bit_quant_type", "fp4"))
    if settings.get("format") and settings["format"] != settings.get("quant_method"):
        yield str(settings["format"])
    size = settings.get("group_size", settings.get("q_group_size"))
    if isinstance(size, int):
        yield f"groups of {size}" if size > 0 else "one group"
    block = settings.get("weight_block_size")
    if isinstance(block, list):
        yield f"blocks of {'x'.join(map(str, block))}"
    if settings.get("desc_act"):
        yield "desc_act"


# What config.json says


def _settings(spec: ModelSpec) -> Mapping[str, Any]:
    """quantization_config or compression_config, of the model or of its text part; empty without one."""
    for holder in (spec.config, spec.config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            settings = holder.get(key) if isinstance(holder, Mapping) else None
            if not settings:
                continue
            if isinstance(settings, Mapping):
                return settings
            raise BadQuantization(spec.source, f"{key} in config.json is not an object: {settings!r:.80}.")
    return {}


def _method_name(spec: ModelSpec) -> str | None:
    settings = _settings(spec)
    name = settings.get("quant_method")
    if name:
        return str(name).lower()
    if any(settings.get(f"load_in_{bits}bit") for bits in (4, 8)):
        return "bitsandbytes"
    return "compressed-tensors" if "config_groups" in settings else None


def _declared(spec: ModelSpec) -> tuple[str, ...]:
    """The formats that config.json may mean. Raises BadQuantization for a method that is not read here."""
    name = _method_name(spec)
    if name is None:
        return tuple(FORMATS.values())
    if name in AUTO_ROUND:
        return _auto_round(spec)
    if name not in FORMATS:
        raise BadQuantization(
            spec.source,
            f"it is quantized with {name!r} (config.json); snugfit reads {', '.join(FORMATS)}. {_WAY_OUT}.",
        )
    return (FORMATS[name],)


def _auto_round(spec: ModelSpec) -> tuple[str, ...]:
    packing = str(_settings(spec).get("packing_format") or "auto_round:gptq")
    for name in ("gptq", "awq"):
        if name in packing:
            return (name,)
    raise BadQuantization(
        spec.source,
        f"AutoRound packed it as {packing!r}; snugfit reads its packing as gptq and as awq. {_WAY_OUT}.",
    )


# What the tensors say


def _format(spec: ModelSpec, tensors: Sequence[Stored]) -> str | None:
    """The module of this package that reads the checkpoint; None where nothing in it is quantized.

    The tensors decide: a config may outlive the quantization that it describes, or be left out.
    """
    declared = _declared(spec)
    if (found := _marked(tensors)) is not None:
        tensor, formats = found
        if "awq" in formats and "awq" in declared and "gptq" in declared:
            formats = (_gptq_or_awq(tensors),)
        if both := [name for name in formats if name in declared]:
            return both[0]
        raise BadQuantization(
            spec.source,
            f"config.json says {_method_name(spec)!r}, and {tensor.name} ({tensor.info.dtype}) is of "
            f"{' or '.join(formats)}. Config and weights belong to different checkpoints.",
        )
    _refuse_integers(spec, tensors)
    return None


def _marked(tensors: Sequence[Stored]) -> tuple[Stored, tuple[str, ...]] | None:
    """The first tensor that only quantized checkpoints have, and the formats that have it."""
    for tensor in tensors:
        if formats := _MARKS.get(tensor.name.rpartition(".")[2]):
            return tensor, formats
    for tensor in tensors:
        if tensor.info.dtype in _EIGHT_BITS:
            return tensor, ("fp8", "compressed")
    return None


def _gptq_or_awq(tensors: Sequence[Stored]) -> str:
    """GPTQ has a column of codes for each output, as there is one of scales; AWQ packs eight into one."""
    columns = {tensor.name: tensor.shape[-1] for tensor in tensors if tensor.shape}
    qweight = next((name for name in columns if name.endswith(".qweight")), "")
    scales = columns.get(f"{qweight.removesuffix('.qweight')}.scales")
    return "awq" if scales == 8 * columns.get(qweight, 0) else "gptq"


def _refuse_integers(spec: ModelSpec, tensors: Sequence[Stored]) -> None:
    """Matrices of packed numbers under names that no format here has. Masks ("attn.bias") are no weights."""
    for tensor in tensors:
        leaf = tensor.name.rpartition(".")[2]
        if tensor.info.dtype in _PACKED and len(tensor.shape) > 1 and not leaf.endswith("bias"):
            raise BadQuantization(
                spec.source,
                f"{tensor.name} is {tensor.info.dtype} {list(tensor.shape)}: a quantization that snugfit "
                f"does not know. It reads {', '.join(FORMATS)}. {_WAY_OUT}.",
            )


def _refuse_twice(source: str, weights: Sequence[Weight]) -> None:
    names: set[str] = set()
    for weight in weights:
        if weight.name in names:
            raise BadQuantization(
                source,
                f"it has {weight.name} twice: quantized and as it was. Two checkpoints are mixed here.",
            )
        names.add(weight.name)
