"""bitsandbytes checkpoints: nf4, fp4 (with and without double quantization) and LLM.int8().

The format is what bitsandbytes' `Linear4bit` and `Linear8bitLt` save (0.50, `QuantState.as_dict`):

4 bits: `weight` holds two codes to a byte, the high half first, over the flattened weight; `weight.quant_map`
the number of each of the 16 codes, `weight.absmax` a scale for every `blocksize` of them, across rows. With
double quantization absmax is one byte itself: nested_quant_map[byte] * nested_absmax[its block] + offset.
Shape, block sizes and offset stand in a JSON text, `weight.quant_state.bitsandbytes__nf4`.

8 bits: `weight` int8 and `SCB`, the largest magnitude of each row.

What comes out is bit-equal to `dequantize_4bit` and `int8_vectorwise_dequant` when it is cast to their dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from exporter.errors import BadQuantization
from exporter.quantization.grid import Grid, blocks, checked
from exporter.quantization.lookup import look_up, nibble_table
from exporter.quantization.parts import part, read_now, refuse_leftovers
from exporter.weights import Inputs, Plain, ReadRows, Stored, Weight, matrix

if TYPE_CHECKING:
    import torch

STATES = {kind: f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
SUFFIXES = (
    ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *STATES.values(), ".SCB",
    ".weight_format",
)  # fmt: skip
STATE_BYTES = 4096  # the JSON has some 200
# 1/127 as bitsandbytes writes it: dividing by 127 instead would differ in the last bit.
INT8_STEP = 7.874015718698502e-3


@dataclass(frozen=True, slots=True)
class Nested:
    """The second quantization, of the scales."""

    quant_map: Stored
    absmax: Stored
    blocksize: int
    offset: float


@dataclass(frozen=True, slots=True)
class FourBit:
    """A weight in nf4 or fp4."""

    name: str
    shape: tuple[int, ...]
    packed: Stored
    quant_map: Stored
    absmax: Stored
    blocksize: int
    nested: Nested | None
    state: Stored
    dtype: str = "F32"

    @property
    def stored(self) -> tuple[Stored, ...]:
        nested = (self.nested.quant_map, self.nested.absmax) if self.nested else ()
        return (self.packed, self.quant_map, self.absmax, *nested, self.state)

    def open(self, inputs: Inputs) -> ReadRows:
        table = nibble_table(inputs.tensor(self.quant_map).view(-1), high_first=True)
        scales = self._open_scales(inputs)
        columns = matrix(self.shape)[1]

        def read(start: int, stop: int) -> torch.Tensor:
            first, last = start * columns, stop * columns
            values = look_up(self._codes(inputs, first, last), table)[first % 2 :][: last - first]
            self._scale(values, first, scales(first // self.blocksize, blocks(last, self.blocksize)))
            return values.view(stop - start, columns)

        return read

    def _codes(self, inputs: Inputs, first: int, last: int) -> torch.Tensor:
        """The bytes with the codes of these elements; stored as bytes, or as wider numbers made of them."""
        import torch

        width = self.packed.info.n_bytes // max(1, prod(self.packed.shape))
        start, stop = first // 2, blocks(last, 2)
        wide = inputs.rows(self.packed, start // width, blocks(stop, width))
        skipped = start % width
        return wide.view(-1).view(torch.uint8)[skipped : skipped + stop - start]

    def _scale(self, values: torch.Tensor, first: int, scales: torch.Tensor) -> None:
        """Multiply in place. Blocks run on across rows, so the first and the last may be cut."""
        head = min(-first % self.blocksize, len(values))
        if head:
            values[:head].mul_(scales[0])
            values, scales = values[head:], scales[1:]
        whole = len(values) // self.blocksize
        values[: whole * self.blocksize].view(whole, self.blocksize).mul_(scales[:whole, None])
        if len(values) > whole * self.blocksize:
            values[whole * self.blocksize :].mul_(scales[whole])

    def _open_scales(self, inputs: Inputs) -> ReadRows:
        """Blocks -> their scales, flat, in fp32."""
        import torch

        nested = self.nested
        if nested is None:
            return lambda start, stop: inputs.rows(self.absmax, start, stop).view(-1)
        table = inputs.tensor(nested.quant_map).view(-1, 1)
        outer = inputs.tensor(nested.absmax).view(-1)
        offset, size = torch.tensor(nested.offset, dtype=torch.float32), nested.blocksize

        def read(start: int, stop: int) -> torch.Tensor:
            scales = look_up(inputs.rows(self.absmax, start, stop), table)
            return scales.mul_(outer[torch.arange(start, stop) // size]).add_(offset)

        return read


@dataclass(frozen=True, slots=True)
class Int8:
    """A weight of LLM.int8()."""

    name: str
    codes: Stored
    magnitudes: Grid
    extra: tuple[Stored, ...] = ()
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.codes, self.magnitudes.stored, *self.extra)

    def open(self, inputs: Inputs) -> ReadRows:
        def read(start: int, stop: int) -> torch.Tensor:
            rows = inputs.rows(self.codes, start, stop).float()
            self.magnitudes.scale(inputs, rows, start)
            return rows.mul_(INT8_STEP)

        return read


def weights(
    source: str,
    settings: Mapping[str, Any],  # noqa: ARG001 - all formats are called alike; this one's files say everything
    tensors: Sequence[Stored],
) -> list[Weight]:
    """Every weight of a bitsandbytes checkpoint, under its name in the model.

    The JSON texts of 4-bit weights are read: raises NeedsDownload (a BadQuantization) for a model on the hub
    that has such. Raises BadQuantization for parts that are missing or do not fit each other, and for int8
    that is not row-major.
    """
    named = {tensor.name: tensor for tensor in tensors}
    found: list[Weight] = []
    for tensor in tensors:
        if tensor.name.endswith(SUFFIXES):
            continue
        state = next((t for t in (named.get(tensor.name + s) for s in STATES.values()) if t), None)
        if state is not None:
            found.append(_four_bit(source, named, tensor, state))
        elif tensor.info.dtype in ("I8", "U8") and tensor.name.endswith(".weight"):
            found.append(_int8(source, named, tensor))
        else:
            found.append(Plain(tensor.name, tensor))
    refuse_leftovers(source, tensors, found, SUFFIXES)
    return found


# 4 bits


def _four_bit(source: str, named: Mapping[str, Stored], packed: Stored, state: Stored) -> FourBit:
    name, settings = packed.name, _state(source, state)
    shape = tuple(settings["shape"])
    nested = None
    if f"{name}.nested_absmax" in named:
        nested = Nested(
            part(source, named, f"{name}.nested_quant_map", name),
            named[f"{name}.nested_absmax"],
            settings["nested_blocksize"],
            settings["nested_offset"],
        )
    quant_map = part(source, named, f"{name}.quant_map", name)
    absmax = part(source, named, f"{name}.absmax", name)
    weight = FourBit(name, shape, packed, quant_map, absmax, settings["blocksize"], nested, state)
    _check_sizes(source, weight)
    return weight


def _state(source: str, stored: Stored) -> dict[str, Any]:
    """The JSON text, when what is needed of it is there."""
    try:
        state = json.loads(read_now(source, stored, STATE_BYTES))
    except (ValueError, RecursionError):
        raise BadQuantization(
            source, f"{stored.name} is not the JSON text that bitsandbytes writes."
        ) from None
    state = state if isinstance(state, dict) else {}
    shape, offset = state.get("shape"), state.setdefault("nested_offset", 0.0)
    sizes = [state.get("blocksize"), state.setdefault("nested_blocksize", 1)]
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape + sizes):
        raise BadQuantization(
            source,
            f"{stored.name} says shape {shape!r}, blocksize {sizes[0]!r} and nested_blocksize {sizes[1]!r}.",
        )
    if not isinstance(offset, int | float):
        raise BadQuantization(source, f"{stored.name} says nested_offset {offset!r}.")
    return state


def _check_sizes(source: str, weight: FourBit) -> None:
    """Refuse parts of other dtypes or lengths than the shape asks for, and a transposed layout."""
    count = blocks(prod(weight.shape), weight.blocksize)
    wanted = [(weight.quant_map, "F32", 16), (weight.absmax, "U8" if weight.nested else "F32", count)]
    if weight.nested:
        wanted += [
            (weight.nested.quant_map, "F32", 256),
            (weight.nested.absmax, "F32", blocks(count, weight.nested.blocksize)),
        ]
    for stored, dtype, numel in wanted:
        if (stored.info.dtype, prod(stored.shape)) != (dtype, numel):
            raise BadQuantization(
                source,
                f"{stored.name} is {stored.info.dtype} {list(stored.shape)}; {weight.name} of "
                f"{list(weight.shape)} in blocks of {weight.blocksize} needs {numel:,} of {dtype}.",
            )
    packed, n_bytes = weight.packed, blocks(prod(weight.shape), 2)
    width = max(1, packed.info.n_bytes // max(1, prod(packed.shape)))
    if matrix(packed.shape)[1] != 1 or packed.info.n_bytes != blocks(n_bytes, width) * width:
        raise BadQuantization(
            source,
            f"{packed.name} is {packed.info.dtype} {list(packed.shape)}; {list(weight.shape)} in 4 bits "
            f"needs {n_bytes:,} bytes in one column.",
        )


# 8 bits


def _int8(source: str, named: Mapping[str, Stored], codes: Stored) -> Int8:
    module = codes.name.removesuffix(".weight")
    if codes.info.dtype != "I8" or len(codes.shape) != 2:
        raise BadQuantization(
            source,
            f"{codes.name} is {codes.info.dtype} {list(codes.shape)} and has no quant_state beside it. It "
            "was saved without its scales (by bitsandbytes before 0.41.3) and cannot be read without them.",
        )
    magnitudes = part(source, named, f"{module}.SCB", codes.name)
    grid = Grid(magnitudes, codes.shape, (1, codes.shape[1]))
    layout = named.get(f"{module}.weight_format")
    # Every bitsandbytes since 0.45 writes row-major, so on the hub, where it cannot be read, that is taken.
    if layout and layout.folder and any(read_now(source, layout, 8)):
        raise BadQuantization(
            source,
            f"{layout.name} says that {codes.name} is not row-major but in a GPU's tile order (col32, "
            "col_turing or col_ampere). Load it once with bitsandbytes before 0.45 and save it again.",
        )
    return Int8(codes.name, codes, checked(source, codes.name, grid, {"F32"}), (layout,) if layout else ())
