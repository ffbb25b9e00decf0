"""The tensors that stand for one linear layer in a GPTQ checkpoint, checked against each other."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import BadQuantization
from exporter.quantization.bitfields import WIDTHS
from exporter.quantization.parts import part
from exporter.weights import Inputs, Stored

if TYPE_CHECKING:
    import torch

DTYPES = {
    "qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32"), "g_idx": ("I32", "I64"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Module:
    """A linear layer of n_outputs x n_inputs.

    qweight: int32 [inputs * bits / 32, outputs], the words of a column end to end are the codes of one
    output; qzeros: int32 [groups, outputs * bits / 32]; scales: float [groups, outputs]; g_idx: int [inputs],
    the group of each input, or none: groups of `group_size` in order.
    """

    source: str
    name: str
    bits: int
    n_inputs: int
    group_size: int  # where there is no g_idx
    qweight: Stored
    qzeros: Stored
    scales: Stored
    g_idx: Stored | None

    @property
    def n_outputs(self) -> int:
        return self.qweight.shape[1]

    @property
    def n_groups(self) -> int:
        return self.scales.shape[0]

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.qweight, self.qzeros, self.scales, *((self.g_idx,) if self.g_idx else ()))

    def groups(self, inputs: Inputs) -> torch.Tensor:
        """The group of each input, int64. Raises BadQuantization for a group that does not exist."""
        import torch

        in_order = torch.arange(self.n_inputs) // self.group_size
        if self.g_idx is None:
            return in_order
        found = inputs.tensor(self.g_idx).long()
        low, high = int(found.min()), int(found.max())
        if low < 0 or high >= self.n_groups:
            raise BadQuantization(
                self.source,
                f"{self.g_idx.name} puts inputs into groups {low} to {high}, and there are {self.n_groups} "
                f"(scales are {list(self.scales.shape)}). The file is damaged: fetch it again.",
            )
        # All zero: some writers leave it so where they did not reorder, and their readers know.
        return in_order if high == 0 else found


def read_module(source: str, name: str, named: Mapping[str, Stored], settings: Mapping[str, Any]) -> Module:
    """The layer `name`, of whose tensors qweight is there. Raises BadQuantization with names and shapes."""
    qweight = named[f"{name}.qweight"]
    qzeros, scales = (part(source, named, f"{name}.{leaf}", name) for leaf in ("qzeros", "scales"))
    g_idx = named.get(f"{name}.g_idx")
    parts = {"qweight": qweight, "qzeros": qzeros, "scales": scales} | ({"g_idx": g_idx} if g_idx else {})
    _check_dtypes(source, parts)
    bits = _bits(source, name, parts)
    inputs = qweight.shape[0] * 32 // bits
    if not _fit(parts, bits, inputs):
        raise _do_not_fit(source, name, parts)
    _check_declared(source, name, bits, settings)
    size = _group_size(source, name, inputs, scales.shape[0], settings, bool(g_idx))
    return Module(source, name, bits, inputs, size, qweight, qzeros, scales, g_idx)


def _check_dtypes(source: str, parts: Mapping[str, Stored]) -> None:
    for leaf, stored in parts.items():
        if stored.info.dtype not in DTYPES[leaf]:
            known = ", ".join(DTYPES[leaf])
            raise BadQuantization(source, f"{stored.name} is {stored.info.dtype}; GPTQ has {known} there.")


def _bits(source: str, name: str, parts: Mapping[str, Stored]) -> int:
    """The width of a code: zero points are as wide, and there is one per output."""
    shapes = [parts[leaf].shape for leaf in ("qweight", "qzeros", "scales")]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        raise _do_not_fit(source, name, parts)
    bits, rest = divmod(32 * shapes[1][1], shapes[0][1])
    if rest == 0 and bits in (5, 6, 7):
        raise BadQuantization(
            source,
            f"{name} has {bits}-bit codes, packed in planes (gptq_p); snugfit reads 2, 3, 4 and 8 bits. Give "
            "a copy of these, or the model that it was made from.",
        )
    if rest or bits not in WIDTHS:
        raise _do_not_fit(source, name, parts)
    return bits


def _fit(parts: Mapping[str, Stored], bits: int, inputs: int) -> bool:
    rows, outputs = parts["qweight"].shape
    groups = parts["scales"].shape[0]
    return (
        rows * 32 % bits == 0
        and parts["qzeros"].shape == (groups, outputs * bits // 32)
        and parts["scales"].shape == (groups, outputs)
        and groups <= inputs
        and ("g_idx" not in parts or parts["g_idx"].shape == (inputs,))
    )


def _do_not_fit(source: str, name: str, parts: Mapping[str, Stored]) -> BadQuantization:
    shapes = ", ".join(f"{leaf} {list(stored.shape)}" for leaf, stored in parts.items())
    return BadQuantization(
        source,
        f"{name}: {shapes} do not fit each other. GPTQ has qweight [inputs * bits / 32, outputs], qzeros "
        "[groups, outputs * bits / 32], scales [groups, outputs] and g_idx [inputs]. Fetch the files again, "
        "or, if they are of another format, name it in config.json (quantization_config).",
    )


# What config.json says


def _check_declared(source: str, name: str, bits: int, settings: Mapping[str, Any]) -> None:
    said = [settings.get("bits"), *(override.get("bits") for _, override in _dynamic(settings))]
    declared = {width for width in said if isinstance(width, int)}
    if declared and bits not in declared:
        known = " or ".join(map(str, sorted(declared)))
        raise BadQuantization(
            source,
            f"{name} has codes of {bits} bits, and config.json says {known} (quantization_config.bits). They "
            "belong to different checkpoints, or the config is wrong: put it right there.",
        )


def _group_size(
    source: str, name: str, inputs: int, n_groups: int, settings: Mapping[str, Any], has_g_idx: bool
) -> int:
    """The size that gives this number of groups: as config.json says for the layer, or even."""
    for size in (_override(source, name, settings).get("group_size"), settings.get("group_size")):
        size = inputs if size == -1 else size
        if isinstance(size, int) and size > 0 and -(-inputs // size) == n_groups:
            return size
    even = -(-inputs // n_groups)
    if inputs % n_groups and not has_g_idx:
        raise BadQuantization(
            source,
            f"{name} has {n_groups} groups for {inputs:,} inputs and no g_idx, and group_size "
            f"{settings.get('group_size')!r} in config.json does not give so many. Put the right one there.",
        )
    return even


def _override(source: str, name: str, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """What config.json says of a layer alone: the first pattern that its name begins with decides."""
    for pattern, override in _dynamic(settings):
        try:
            if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
                return {} if pattern.startswith("-:") else override
        except re.error as err:
            raise BadQuantization(
                source, f"quantization_config has {pattern!r}, which is no pattern: {err}."
            ) from None
    return {}


def _dynamic(settings: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Settings of some layers only: GPTQModel's key, and AutoRound's."""
    for key in ("dynamic", "extra_config"):
        found = settings.get(key)
        for pattern, override in found.items() if isinstance(found, Mapping) else ():
            if isinstance(override, Mapping):
                yield pattern, override
