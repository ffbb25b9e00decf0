"""AWQ checkpoints in the layout "gemm": 4 bits, groups of inputs in order.

Format: AutoAWQ's WQLinear_GEMM. A layer has qweight int32 [inputs, outputs / 8], qzeros int32 [groups,
outputs / 8] and scales float [groups, outputs]. A word holds eight outputs in the order ORDER, its lowest
four bits first. W[o, i] = (q[i, o] - z[g, o]) * s[g, o] in float32. Zero points are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import BadQuantization
from exporter.quantization import grouped
from exporter.quantization.parts import part, refuse_leftovers
from exporter.weights import Inputs, Plain, ReadRows, Stored, Weight

if TYPE_CHECKING:
    import torch

BITS = 4
PER_WORD = 32 // BITS
# The output, of a word's eight, whose code is in bits 0-3, 4-7, ...
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MIDDLE = 1 << (BITS - 1)
QWEIGHT, QZEROS = ".qweight", ".qzeros"
DTYPES = {"qweight": ("I32",), "qzeros": ("I32",), "scales": ("F16", "BF16", "F32")}


@dataclass(frozen=True, slots=True)
class Awq:
    """The weight of a quantized layer, [outputs, inputs]."""

    module: str
    qweight: Stored
    qzeros: Stored | None  # None: the zero point is the middle
    scales: Stored
    symmetric: bool
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return f"{self.module}.weight"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.scales.shape[1], self.qweight.shape[0]

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.qweight, *((self.qzeros,) if self.qzeros else ()), self.scales)

    def open(self, inputs: Inputs) -> ReadRows:
        import torch

        outputs, columns = self.shape
        n_groups = self.scales.shape[0]
        groups = torch.arange(columns) // (columns // n_groups)
        has_zeros = self._has_zeros(inputs)
        return grouped.read_rows(
            (outputs, columns), BITS, groups, n_groups, lambda a, b: self._slab(inputs, a, b, has_zeros)
        )

    def _has_zeros(self, inputs: Inputs) -> bool:
        """Whether qzeros counts. Symmetric checkpoints may carry one that nobody filled."""
        if self.qzeros is None:
            return False
        return not self.symmetric or bool(inputs.tensor(self.qzeros).any())

    def _slab(self, inputs: Inputs, first: int, stop: int, has_zeros: bool) -> grouped.Slab:
        import torch

        scales = grouped.turned(inputs, self.scales, first, stop).float()
        zeros = torch.full_like(scales, MIDDLE)
        if has_zeros and self.qzeros is not None:
            write_codes(
                grouped.turned(inputs, self.qzeros, first // PER_WORD, stop // PER_WORD),
                0,
                stop - first,
                zeros,
            )
        words = grouped.turned(inputs, self.qweight, first // PER_WORD, stop // PER_WORD)
        return grouped.Slab(first, stop, lambda a, b, out: write_codes(words, a, b, out), zeros, scales)


def write_codes(words: torch.Tensor, start: int, stop: int, out: torch.Tensor) -> None:
    """The codes of outputs start..stop, out of words [outputs / 8, n], into float32 [stop - start, n]."""
    for position, output in enumerate(ORDER):
        first = -(-(start - output) // PER_WORD)
        last = -(-(stop - output) // PER_WORD)
        if first < last:
            codes = (words[first:last] >> (BITS * position)).bitwise_and_((1 << BITS) - 1)
            out[first * PER_WORD + output - start :: PER_WORD].copy_(codes)


def weights(
    source: str,
    settings: Mapping[str, Any],
    tensors: Sequence[Stored],
) -> list[Weight]:
    """Every weight of an AWQ checkpoint, under its name in the model, a layer's where its qweight stands.

    Raises BadQuantization for another layout or width, and for tensors that are missing or do not fit.
    """
    _check_settings(source, settings)
    named = {tensor.name: tensor for tensor in tensors}
    layers = {
        tensor.name: _awq(source, tensor.name.removesuffix(QWEIGHT), named, settings)
        for tensor in tensors
        if tensor.name.endswith(QWEIGHT)
    }
    parts = {stored.name for layer in layers.values() for stored in layer.stored}
    found: list[Weight] = []
    for tensor in tensors:
        if tensor.name in layers:
            found.append(layers[tensor.name])
        elif tensor.name not in parts and not tensor.name.endswith(QZEROS):
            found.append(Plain(tensor.name, tensor))
    refuse_leftovers(source, tensors, found, (QZEROS,))
    return found


def _check_settings(source: str, settings: Mapping[str, Any]) -> None:
    version = settings.get("version") or settings.get("format") or settings.get("checkpoint_format") or "gemm"
    if str(version).lower() != "gemm":
        raise BadQuantization(
            source,
            f"it is AWQ in the layout {version!r}; snugfit reads 'gemm'. Give a copy in that layout, or the "
            "model that it was made from.",
        )
    bits = settings.get("bits", settings.get("w_bit", BITS))
    if bits != BITS:
        raise BadQuantization(source, f"it is AWQ of {bits!r} bits; snugfit reads {BITS}.")


def _awq(source: str, name: str, named: Mapping[str, Stored], settings: Mapping[str, Any]) -> Awq:
    symmetric = settings.get("zero_point") is False
    qweight, scales = named[f"{name}.qweight"], part(source, named, f"{name}.scales", name)
    qzeros = named.get(f"{name}.qzeros")
    if qzeros is None and not symmetric:
        part(source, named, f"{name}.qzeros", name)
    parts = {"qweight": qweight, "scales": scales} | ({"qzeros": qzeros} if qzeros else {})
    for leaf, stored in parts.items():
        if stored.info.dtype not in DTYPES[leaf]:
            known = ", ".join(DTYPES[leaf])
            raise BadQuantization(source, f"{stored.name} is {stored.info.dtype}; AWQ has {known} there.")
    _check_shapes(source, name, parts, settings.get("group_size", settings.get("q_group_size")))
    return Awq(name, qweight, qzeros, scales, symmetric)


def _check_shapes(source: str, name: str, parts: Mapping[str, Stored], group_size: Any) -> None:
    shapes = {leaf: stored.shape for leaf, stored in parts.items()}
    if any(len(shape) != 2 or 0 in shape for shape in shapes.values()) or not _fit(**shapes):
        listed = ", ".join(f"{leaf} {list(shape)}" for leaf, shape in shapes.items())
        raise BadQuantization(
            source,
            f"{name}: {listed} do not fit each other. AWQ's layout 'gemm' has qweight [inputs, outputs / 8], "
            "qzeros [groups, outputs / 8] and scales [groups, outputs]. Fetch the files again, or, if they "
            "are of another layout or format, name it in config.json (quantization_config).",
        )
    inputs, n_groups = shapes["qweight"][0], shapes["scales"][0]
    size = inputs if group_size == -1 else group_size
    if isinstance(size, int) and size * n_groups != inputs:
        raise BadQuantization(
            source,
            f"{name} has {n_groups} groups for {inputs:,} inputs, and config.json says group_size "
            f"{group_size}. They belong to different checkpoints, or the config is wrong: put it right.",
        )


def _fit(qweight: tuple[int, ...], scales: tuple[int, ...], qzeros: tuple[int, ...] | None = None) -> bool:
    (inputs, words), (n_groups, outputs) = qweight, scales
    whole = inputs % n_groups == 0 and words * PER_WORD == outputs
    return whole and qzeros in (None, (n_groups, words))
