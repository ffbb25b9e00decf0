"""fp8 checkpoints: scales per block of 128x128 (DeepSeek's format, transformers' "fp8"), row or tensor.

Format: a weight NAME of fp8 with `NAME_scale_inv` (quant_method "fp8": a scale for each block of
weight_block_size, float or ue8m0) or `NAME_scale` (one for the tensor or one for each row, as fbgemm_fp8 and
AutoFP8 write). Either is multiplied: "inv" says that it is the inverse of what quantized the weight.

What comes out is weight * scale in fp32, the product that transformers' `Fp8Dequantize` rounds. The block is
config.json's and never derived from the grid: 250 rows with 2 scales would pass as blocks of 125.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporter.errors import BadQuantization
from exporter.quantization.grid import EXPONENTS, FLOATS, Grid, checked
from exporter.quantization.lookup import float8_table, look_up
from exporter.quantization.parts import ACTIVATION_SUFFIXES, refuse_leftovers
from exporter.weights import Inputs, Plain, ReadRows, Stored, Weight

if TYPE_CHECKING:
    import torch

BLOCK_SCALE, SCALE = "_scale_inv", "_scale"
SUFFIXES = (".weight" + BLOCK_SCALE, ".weight" + SCALE)
READABLE = ("F8_E4M3", "F8_E5M2")
OTHERS = ("F8_E4M3FNUZ", "F8_E5M2FNUZ", "F4", "F6_E2M3", "F6_E3M2")
DEFAULT_BLOCK = (128, 128)  # transformers' FineGrainedFP8Config


@dataclass(frozen=True, slots=True)
class Float8:
    """A weight of 8-bit floats with a grid of scales."""

    name: str
    codes: Stored
    scales: Grid
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.codes, self.scales.stored)

    def open(self, inputs: Inputs) -> ReadRows:
        import torch

        from loader.shards import torch_dtype

        table = float8_table(torch_dtype(self.codes.info.dtype))

        def read(start: int, stop: int) -> torch.Tensor:
            codes = inputs.rows(self.codes, start, stop).view(torch.uint8)
            rows = look_up(codes, table).view(stop - start, -1)
            self.scales.scale(inputs, rows, start)
            return rows

        return read


def weights(
    source: str,
    settings: Mapping[str, Any],
    tensors: Sequence[Stored],
) -> list[Weight]:
    """Every weight of an fp8 checkpoint (quant_method "fp8" or "fbgemm_fp8"), under its name in the model.

    Scales of activations and of the KV cache are left out. Raises BadQuantization for a grid that does not
    match the weight, and for 8-bit and 4-bit floats that are stored in another way.
    """
    block = _block_size(source, settings)
    named = {tensor.name: tensor for tensor in tensors}
    scales = {t.name + suffix for t in tensors for suffix in (BLOCK_SCALE, SCALE) if t.name + suffix in named}
    found: list[Weight] = []
    for tensor in tensors:
        if tensor.info.dtype in READABLE and tensor.name not in scales:
            found.append(_float8(source, named, tensor, block))
        elif tensor.info.dtype in OTHERS or tensor.name + BLOCK_SCALE in named:
            raise BadQuantization(
                source,
                f"{tensor.name} is {tensor.info.dtype}; of floats with scales snugfit reads "
                f"{' and '.join(READABLE)}, no packed fp4. Give the 16-bit original as --base.",
            )
        elif tensor.name not in scales and not tensor.name.endswith(SUFFIXES + ACTIVATION_SUFFIXES):
            found.append(Plain(tensor.name, tensor))
    refuse_leftovers(source, tensors, found, SUFFIXES)
    return found


def _block_size(source: str, settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: one scale for a tensor, or for a row."""
    block = settings.get("weight_block_size", DEFAULT_BLOCK)
    if block is None:
        return None
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(n) is int and n > 0 for n in block)
    ):
        raise BadQuantization(source, f"weight_block_size {block!r} in config.json is not [rows, columns].")
    return block[0], block[1]


def _float8(source: str, named: Mapping[str, Stored], codes: Stored, block: tuple[int, int] | None) -> Float8:
    name, shape = codes.name, codes.shape
    by_block, plain = named.get(name + BLOCK_SCALE), named.get(name + SCALE)
    if len(shape) < 2 or (by_block is None and (plain is None or len(shape) != 2)):
        raise BadQuantization(
            source,
            f"{name} is {codes.info.dtype} {list(shape)} and has neither {name}{BLOCK_SCALE} beside it nor, "
            f"for a matrix, {name}{SCALE}: without its scales it cannot be read.",
        )
    if by_block is not None and block is not None:
        return Float8(name, codes, checked(source, name, Grid(by_block, shape, block), FLOATS | EXPONENTS))
    scale = by_block or plain
    assert scale is not None
    whole = all(n == 1 for n in scale.shape)
    grid = Grid(scale, shape, (shape[-2] if whole else 1, shape[-1]))
    return Float8(name, codes, checked(source, name, grid, FLOATS | EXPONENTS))
