"""compressed-tensors' part of config.json: which layers were quantized how.

Format: `QuantizationConfig` of the compressed-tensors project (0.20 and back to 0.3): config_groups, each
with targets (a layer's name, "re:" and a pattern, or a class) and the arguments for weights; `format` at the
top or in the group. What `ignore` names is stored as plain numbers, so the tensors themselves show it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from exporter.errors import BadQuantization

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
NO_FORMAT = ("dense", "mixed-precision")  # the first quantizes nothing, the second leaves it to the groups
CLASSES = ("Linear", "Embedding")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of some layers were quantized."""

    targets: tuple[str, ...]
    kind: str  # "int" or "float"
    bits: int
    symmetric: bool
    strategy: str  # what shares a scale: "tensor", "channel", "group" or "block"
    size: tuple[int, int] | None  # of a group or block, rows and columns

    def block(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns that share a scale in a weight of this shape."""
        rows, columns = shape
        return self.size or ((rows if self.strategy == "tensor" else 1), columns)


def schemes(source: str, settings: Mapping[str, Any]) -> tuple[Scheme, ...]:
    """The groups that quantize weights.

    Raises BadQuantization for formats that are not read, by their names, and groups that make no sense.
    """
    if isinstance(settings.get("quantization_config"), Mapping):  # until compressed-tensors 0.4
        settings = {**settings, **settings["quantization_config"]}
    _refuse_sparse_and_rotated(source, settings)
    _check_format(source, settings.get("format"), (*FORMATS, *NO_FORMAT, None))
    groups = settings.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        raise BadQuantization(source, "config.json has no config_groups that say how it was quantized.")
    return tuple(_scheme(source, name, group) for name, group in groups.items() if group.get("weights"))


def scheme_of(source: str, module: str, found: tuple[Scheme, ...]) -> Scheme:
    """The scheme of a quantized layer: by its name, then a pattern, then its class, as the library looks.

    A file does not know classes: what is called "…embed…" is taken for an Embedding, all else for Linear.
    """
    by_target = {target: scheme for scheme in found for target in scheme.targets}
    for target in sorted(by_target, key=lambda text: (text.startswith("re:"), text)):
        if target == module or (target.startswith("re:") and _matches(source, target, module)):
            return by_target[target]
    kind = CLASSES["embed" in module.rpartition(".")[2]]
    if kind in by_target:
        return by_target[kind]
    if len({(s.kind, s.bits, s.symmetric, s.strategy, s.size) for s in found}) == 1:
        return found[0]  # names may differ from those it was quantized under; there is one way only
    targets = ", ".join(by_target) or "there are none"
    raise BadQuantization(
        source, f"{module} is quantized and no target of config_groups is meant ({targets})."
    )


def _matches(source: str, target: str, module: str) -> bool:
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as err:
        raise BadQuantization(source, f"config_groups target {target!r} is no pattern: {err}.") from None


def _refuse_sparse_and_rotated(source: str, settings: Mapping[str, Any]) -> None:
    sparsity = settings.get("sparsity_config")
    kind = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if kind not in (None, "dense"):
        raise BadQuantization(
            source, f"its weights are stored sparse ({kind}), which snugfit does not read. {_WAY_OUT}"
        )
    transforms = settings.get("transform_config")
    if isinstance(transforms, Mapping) and transforms.get("config_groups"):
        raise BadQuantization(
            source,
            "its weights were rotated (transform_config), and without the rotations at run time they are "
            f"those of another model. {_WAY_OUT}",
        )


_WAY_OUT = "Give the model it was made from as --base, or a copy quantized in another format."


def _check_format(source: str, name: Any, known: tuple[str | None, ...]) -> None:
    if name not in known:
        raise BadQuantization(
            source, f"compressed-tensors format {name!r}: snugfit reads {', '.join(FORMATS)}. {_WAY_OUT}"
        )


def _scheme(source: str, name: str, group: Mapping[str, Any]) -> Scheme:
    _check_format(source, group.get("format"), (*FORMATS, None))
    weights, targets = group["weights"], group.get("targets")
    if not isinstance(weights, Mapping) or not isinstance(targets, list):
        raise BadQuantization(
            source, f"config_groups {name!r} has no targets and weights that snugfit can read."
        )
    kind, bits, size = weights.get("type", "int"), weights.get("num_bits", 8), weights.get("group_size")
    if type(bits) is not int or ((kind, bits) != ("float", 8) and (kind != "int" or not 1 <= bits <= 8)):
        raise BadQuantization(
            source,
            f"config_groups {name!r} has {bits}-bit {kind} weights; snugfit reads int and 8-bit float.",
        )
    strategy, block = _shared(weights)
    if block is False:
        structure = weights.get("block_structure")
        raise BadQuantization(
            source,
            f"config_groups {name!r} has strategy {strategy!r} with group_size {size!r} and block_structure "
            f"{structure!r}; snugfit reads tensor, channel, group (a group_size) and block (rows, columns).",
        )
    symmetric = weights.get("symmetric", True) is not False
    return Scheme(tuple(map(str, targets)), kind, bits, symmetric, strategy, block)


def _shared(weights: Mapping[str, Any]) -> tuple[Any, Any]:
    """(strategy, size of what shares a scale: None for tensor or row, False for what cannot be read)."""
    size = weights.get("group_size")
    whole = type(size) is int and size > 0
    strategy = weights.get("strategy") or ("group" if whole else "channel" if size == -1 else "tensor")
    if strategy in ("tensor", "channel"):
        return strategy, None
    if strategy == "group":
        return strategy, (1, size) if whole else False
    return strategy, strategy == "block" and _block_structure(weights.get("block_structure"))


def _block_structure(value: Any) -> Any:
    """(rows, columns) of [128, 128] or, as older configs have it, "128x128"; False of anything else."""
    parts = value.split("x") if isinstance(value, str) else value
    if (
        not isinstance(parts, list)
        or len(parts) != 2
        or not all(str(n).isdecimal() and int(n) for n in parts)
    ):
        return False
    return int(parts[0]), int(parts[1])
