"""Which of the two ways of storing zero points a GPTQ checkpoint follows.

"v1" (AutoGPTQ, and what config.json calls "gptq" or nothing) stores each zero point less one; "v2"
("gptq_v2", GPTQModel) stores it as it is. The label is wrong in checkpoints that people use (vLLM's pull
request 38966 names one), and taking one for the other moves every weight by a whole step. So numbers decide:

- symmetric quantization has one zero point, the middle 2^(bits - 1): all that is stored is that, or one less;
- otherwise weights lie about zero, and so codes about their zero points: on average what is stored is the
  mean code, or one less. With 8 bits a step is too small against the weights' own mean for that to tell;
- where neither tells, the label does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from exporter.errors import BadQuantization
from exporter.quantization.bitfields import unpack
from exporter.quantization.grouped import turn
from exporter.quantization.module import Module
from exporter.weights import Inputs

if TYPE_CHECKING:
    import torch

V1, V2 = "gptq", "gptq_v2"
SAMPLES = 8
SAMPLE_BYTES = 2**20  # of packed codes, of each module
# How far a mean may be from 0 or 1 to count as it. The layers of the built-in model are within 0.08.
NEAR = 0.3
# One for each zero point of a packed word. GPTQModel subtracts and adds whole words, so that a zero point of
# 0, stored as all ones, has borrowed from its neighbour and gives back here.
_ONES = {2: 0x5555_5555, 4: 0x1111_1111, 8: 0x0101_0101}


@dataclass(eq=False)
class ZeroPoints:
    """One answer for all modules of a checkpoint, found when the first of them is opened."""

    source: str
    label: str  # V1 or V2
    modules: Sequence[Module]
    _found: str | None = field(default=None, init=False)

    def version(self, inputs: Inputs) -> str:
        """V1 or V2. Raises BadQuantization when some modules follow one and some the other."""
        if self._found is None:
            step = max(1, len(self.modules) // SAMPLES)
            self._found = self._decide(inputs, self.modules[::step][:SAMPLES])
        return self._found

    def unpack(self, inputs: Inputs, words: torch.Tensor, bits: int) -> torch.Tensor:
        """qzeros as stored, [groups, outputs * bits / 32] -> zero points, [groups, outputs] uint8."""
        import torch

        if self.version(inputs) == V2:
            return unpack(words.view(torch.uint8), bits)
        if bits in _ONES:
            return unpack((words + _ONES[bits]).view(torch.uint8), bits)
        return unpack(words.view(torch.uint8), bits).add_(1).bitwise_and_((1 << bits) - 1)

    def _decide(self, inputs: Inputs, sample: Sequence[Module]) -> str:
        middles = {module.name: _middle(inputs, module) for module in sample}
        by_version = {version: name for name, version in middles.items()}
        if V1 in by_version and V2 in by_version:
            raise BadQuantization(
                self.source,
                f"the zero points of {by_version[V1]} are stored less one (v1) and those of {by_version[V2]} "
                "as they are (v2). The checkpoint was put together from two; give one made in one go.",
            )
        if certain := by_version.keys() - {None}:
            return str(certain.pop())
        offsets = [_offset(inputs, module) for module in sample if module.bits < 8]
        for version, offset in ((V1, 1.0), (V2, 0.0)):
            if offsets and all(abs(found - offset) < NEAR for found in offsets):
                return version
        return self.label


def _middle(inputs: Inputs, module: Module) -> str | None:
    """The version that explains why all zero points of a module are the same; None when they are not."""
    zeros = _stored(inputs, module)
    low, high = int(zeros.min()), int(zeros.max())
    middle = 1 << (module.bits - 1)
    return {middle - 1: V1, middle: V2}.get(low) if low == high else None


def _offset(inputs: Inputs, module: Module) -> float:
    """Mean of (code - stored zero point) over the first inputs of a module."""
    import torch

    rows = SAMPLE_BYTES // (4 * module.n_outputs)
    rows = min(module.qweight.shape[0], max(1, rows // module.bits) * module.bits)
    words = turn(inputs.rows(module.qweight, 0, rows))
    codes = unpack(words.view(torch.uint8), module.bits)
    groups = module.groups(inputs)[: codes.shape[1]]
    zeros = _stored(inputs, module).index_select(0, groups)
    return float(codes.sum(dtype=torch.int64) - zeros.sum(dtype=torch.int64)) / codes.numel()


def _stored(inputs: Inputs, module: Module) -> torch.Tensor:
    import torch

    return unpack(inputs.tensor(module.qzeros).view(torch.uint8), module.bits)
