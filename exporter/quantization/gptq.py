"""GPTQ checkpoints: 2, 3, 4 and 8 bits, either kind of zero points, inputs in any order of groups.

The format is that of AutoGPTQ and GPTQModel (`checkpoint_format` "gptq" and "gptq_v2"), which AutoRound
writes too; exporter/quantization/module.py has the tensors.
W[o, i] = (q[o, i] - z[g[i], o]) * s[g[i], o] in float32.

What a layer is stands in its tensors: the width of a code follows from qzeros, the inputs from qweight.
config.json is asked only where they leave a choice, and must not contradict them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import BadQuantization
from exporter.quantization import grouped
from exporter.quantization.bitfields import unpack
from exporter.quantization.module import Module, read_module
from exporter.quantization.parts import refuse_leftovers
from exporter.quantization.zero_points import V1, V2, ZeroPoints
from exporter.weights import Inputs, Plain, ReadRows, Stored, Weight

if TYPE_CHECKING:
    import torch

QWEIGHT = ".qweight"
COMPANIONS = (".qzeros", ".g_idx")  # never there without it; "scales" may be a name of the model's own


@dataclass(frozen=True, slots=True)
class Gptq:
    """The weight of a quantized layer, [outputs, inputs]."""

    module: Module
    zeros: ZeroPoints
    dtype: str = "F32"

    @property
    def name(self) -> str:
        return f"{self.module.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.n_outputs, self.module.n_inputs

    @property
    def stored(self) -> tuple[Stored, ...]:
        return self.module.stored

    def open(self, inputs: Inputs) -> ReadRows:
        module = self.module
        return grouped.read_rows(
            self.shape,
            module.bits,
            module.groups(inputs),
            module.n_groups,
            lambda a, b: self._slab(inputs, a, b),
        )

    def _slab(self, inputs: Inputs, first: int, stop: int) -> grouped.Slab:
        import torch

        module, bits = self.module, self.module.bits
        packed = grouped.turned(inputs, module.qweight, first, stop).view(torch.uint8)
        words = inputs.columns(module.qzeros, first * bits // 32, stop * bits // 32)
        zeros = grouped.turn(self.zeros.unpack(inputs, words, bits)).float()
        scales = grouped.turned(inputs, module.scales, first, stop).float()

        def write_codes(start: int, stop: int, out: torch.Tensor) -> None:
            out.copy_(unpack(packed[start:stop], bits))

        return grouped.Slab(first, stop, write_codes, zeros, scales)


def weights(source: str, settings: Mapping[str, Any], tensors: Sequence[Stored]) -> list[Weight]:
    """Every weight of a GPTQ checkpoint, under its name in the model, a layer's where its qweight stands.

    Raises BadQuantization for another packing than GPTQ's own, and for tensors that are missing or do not
    fit each other.
    """
    label = _label(source, settings)
    named = {tensor.name: tensor for tensor in tensors}
    modules = {
        tensor.name: read_module(source, tensor.name.removesuffix(QWEIGHT), named, settings)
        for tensor in tensors
        if tensor.name.endswith(QWEIGHT)
    }
    zeros = ZeroPoints(source, label, tuple(modules.values()))
    parts = {stored.name for module in modules.values() for stored in module.stored}
    found: list[Weight] = []
    for tensor in tensors:
        if tensor.name in modules:
            found.append(Gptq(modules[tensor.name], zeros))
        elif tensor.name not in parts and not tensor.name.endswith(COMPANIONS):
            found.append(Plain(tensor.name, tensor))
    refuse_leftovers(source, tensors, found, COMPANIONS)
    return found


def note(weights: Sequence[Weight], inputs: Inputs) -> str | None:
    """What a log should say of zero points that are stored otherwise than config.json says, if they are."""
    zeros = next((weight.zeros for weight in weights if isinstance(weight, Gptq)), None)
    if zeros is None or zeros.version(inputs) == zeros.label:
        return None
    return f"zero points are stored as in {zeros.version(inputs)!r}, while config.json says {zeros.label!r}"


def _label(source: str, settings: Mapping[str, Any]) -> str:
    """V1 or V2, as config.json has it. Raises BadQuantization for any other packing."""
    said = settings.get("checkpoint_format") or settings.get("format") or V1
    if settings.get("is_marlin_format"):
        said = "marlin"
    if said not in (V1, V2):
        raise BadQuantization(
            source,
            f"it is GPTQ packed as {said!r}; snugfit reads {V1} and {V2}. Give a copy in one of these, or "
            "the model that it was made from.",
        )
    return str(said)
