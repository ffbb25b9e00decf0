"""compressed-tensors checkpoints (llm-compressor, and vLLM's own): pack-, int-, float- and naive-quantized.

Format: the compressors of the compressed-tensors project, 0.20, and 0.12 for what later versions dropped.
A layer has `weight_packed` (int32 [out, ceil(in * bits / 32)], the first code in the lowest bits, codes
shifted to be positive) and `weight_shape`, or a `weight` of int8 or fp8; and `weight_scale` per tensor, row,
group of columns or block. `weight_zero_point` is packed along rows where the weight is packed; `weight_g_idx`
gives each column's group where groups are not in order.

The library computes (code - zero point) * scale in the dtype of the scale, with one rounding. Here it is the
same product in fp32, where it is exact for scales of 16 bits: cast to the scale's dtype it is the library's.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from exporter.errors import BadQuantization
from exporter.quantization.config_groups import Scheme, scheme_of, schemes
from exporter.quantization.grid import FLOATS, Grid, blocks, checked
from exporter.quantization.lookup import float8_table, look_up, nibble_table
from exporter.quantization.parts import ACTIVATION_SUFFIXES, part, read_now, refuse_leftovers
from exporter.weights import Inputs, Plain, ReadRows, Stored, Weight

if TYPE_CHECKING:
    import torch

PACKED = ".weight_packed"
SUFFIXES = (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx", ".weight_global_scale")
PACKED_BITS = (4, 8)
CODES = {"int": ("I8",), "float": ("F8_E4M3",)}
ZEROS = frozenset({"I8", "F8_E4M3"}) | FLOATS


@dataclass(frozen=True, slots=True)
class PackedZeros(Grid):
    """Zero points packed along rows: int32 [ceil(out * bits / 32), groups], shifted to be positive."""

    bits: int = 4

    def read(self, inputs: Inputs, start: int, stop: int) -> torch.Tensor:
        import torch

        per_word = 32 // self.bits
        top = start // per_word
        words = inputs.rows(self.stored, top, blocks(stop, per_word))
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32).view(1, -1, 1)
        codes = (words.unsqueeze(1) >> shifts) & ((1 << self.bits) - 1)
        zeros = codes.view(-1, words.shape[1])[start - top * per_word : stop - top * per_word]
        return zeros.float().sub_(1 << (self.bits - 1))


@dataclass(frozen=True, slots=True)
class Compressed:
    """A weight as codes with scales and perhaps zero points."""

    name: str
    shape: tuple[int, ...]
    codes: Stored
    bits: int  # of a packed code; 8 where codes are not packed
    scales: Grid
    zeros: Grid | None = None
    groups: Stored | None = None  # weight_g_idx
    extra: tuple[Stored, ...] = ()  # read while planning
    dtype: str = "F32"

    @property
    def stored(self) -> tuple[Stored, ...]:
        zeros = (self.zeros.stored,) if self.zeros else ()
        groups = (self.groups,) if self.groups else ()
        return (self.codes, self.scales.stored, *zeros, *groups, *self.extra)

    def open(self, inputs: Inputs) -> ReadRows:
        numbers = self._open_codes(inputs)
        groups = self._column_groups(inputs)

        def read(start: int, stop: int) -> torch.Tensor:
            rows = numbers(start, stop)
            if self.zeros:
                self.zeros.subtract(inputs, rows, start, groups)
            self.scales.scale(inputs, rows, start, groups)
            return rows

        return read

    def _open_codes(self, inputs: Inputs) -> ReadRows:
        """Rows of codes as fp32 numbers in memory of their own, before zero point and scale."""
        import torch

        dtype, columns = self.codes.info.dtype, self.shape[1]
        if dtype == "I8":
            return lambda start, stop: inputs.rows(self.codes, start, stop).float()
        if dtype == "F8_E4M3":
            table = float8_table(torch.float8_e4m3fn)
        else:
            table = nibble_table(torch.arange(-8, 8), high_first=False)

        def read(start: int, stop: int) -> torch.Tensor:
            codes = inputs.rows(self.codes, start, stop).view(torch.uint8)
            numbers = codes.float().sub_(128) if dtype == "I32" and self.bits == 8 else look_up(codes, table)
            return numbers.view(stop - start, -1)[:, :columns].contiguous()

        return read

    def _column_groups(self, inputs: Inputs) -> torch.Tensor | None:
        """Each column's group, or None where they are in order: -1 anywhere says that it was never set."""
        if self.groups is None:
            return None
        groups = inputs.tensor(self.groups).view(-1)
        if bool((groups < 0).any()):
            return None
        if int(groups.max()) >= self.scales.lines[1]:
            raise BadQuantization(
                self.groups.info.file,
                f"{self.groups.name} names group {int(groups.max())}, and {self.name} has "
                f"{self.scales.lines[1]}.",
            )
        return groups.int()


def weights(
    source: str,
    settings: Mapping[str, Any],
    tensors: Sequence[Stored],
) -> list[Weight]:
    """Every weight of a compressed-tensors checkpoint, under its name in the model.

    Scales of activations and of the KV cache are left out. Raises BadQuantization for formats, parts and
    shapes that cannot be read, by their names.
    """
    found_schemes = schemes(source, settings)
    named = {tensor.name: tensor for tensor in tensors}
    found: list[Weight] = []
    for tensor in tensors:
        module = tensor.name.removesuffix(PACKED).removesuffix(".weight")
        if tensor.name.endswith(PACKED):
            found.append(_packed(source, named, tensor, scheme_of(source, module, found_schemes)))
        elif tensor.name == f"{module}.weight" and _is_quantized(named, tensor, module):
            found.append(_stored_codes(source, named, tensor, scheme_of(source, module, found_schemes)))
        elif not tensor.name.endswith(SUFFIXES + ACTIVATION_SUFFIXES):
            found.append(Plain(tensor.name, tensor))
    refuse_leftovers(source, tensors, found, SUFFIXES)
    return found


def _is_quantized(named: Mapping[str, Stored], tensor: Stored, module: str) -> bool:
    return f"{module}.weight_scale" in named or tensor.info.dtype not in FLOATS | {"F64"}


def _packed(source: str, named: Mapping[str, Stored], codes: Stored, scheme: Scheme) -> Compressed:
    """A layer of pack-quantized."""
    name = codes.name.removesuffix("_packed")
    if scheme.kind != "int" or scheme.bits not in PACKED_BITS:
        raise BadQuantization(
            source,
            f"{codes.name} holds {scheme.bits}-bit {scheme.kind} codes; of packed ones snugfit reads int of "
            f"{' and '.join(map(str, PACKED_BITS))} bits.",
        )
    if codes.info.dtype != "I32" or len(codes.shape) != 2:
        raise BadQuantization(
            source,
            f"{codes.name} is {codes.info.dtype} {list(codes.shape)}; packed weights are int32 matrices.",
        )
    scale, written = part(source, named, f"{name}_scale", name), named.get(f"{name}_shape")
    shape = _packed_shape(source, codes, scale, written, scheme)
    weight = _assemble(source, named, name, codes, shape, scheme)
    return replace(weight, bits=scheme.bits, extra=(written,) if written else ())


def _packed_shape(
    source: str, codes: Stored, scale: Stored, written: Stored | None, scheme: Scheme
) -> tuple[int, int]:
    """[out, in]: weight_shape says it; on the hub it follows from the scales' groups, or from whole words."""
    out, words = codes.shape
    per_word = 32 // scheme.bits
    columns = words * per_word
    if scheme.strategy == "group" and scheme.size and len(scale.shape) == 2:
        columns = min(columns, scale.shape[1] * scheme.size[1])
    if written is None or written.folder is None:
        return out, columns
    raw, number = read_now(source, written, 16), {"I64": "q", "I32": "i"}.get(written.info.dtype)
    shape = struct.unpack(f"<{prod(written.shape)}{number}", raw) if number else ()
    if len(shape) != 2 or shape[0] != out or blocks(shape[1], per_word) != words:
        raise BadQuantization(
            source,
            f"{written.name} says {list(shape)}, and {codes.name} of {list(codes.shape)} holds {out} rows of "
            f"up to {words * per_word} codes of {scheme.bits} bits.",
        )
    return out, shape[1]


def _stored_codes(source: str, named: Mapping[str, Stored], codes: Stored, scheme: Scheme) -> Compressed:
    """A layer of int-, float- or naive-quantized: one code to an element."""
    if codes.info.dtype not in CODES[scheme.kind] or len(codes.shape) != 2:
        raise BadQuantization(
            source,
            f"{codes.name} is {codes.info.dtype} {list(codes.shape)}, where config.json has "
            f"{scheme.bits}-bit {scheme.kind} codes ({CODES[scheme.kind][0]}, a matrix). A model that was "
            "calibrated and not compressed has to be saved compressed first.",
        )
    return _assemble(source, named, codes.name, codes, codes.shape, scheme)


def _assemble(
    source: str, named: Mapping[str, Stored], name: str, codes: Stored, shape: tuple[int, ...], scheme: Scheme
) -> Compressed:
    """The weight with its scales and zero points, when they fit its shape."""
    block = scheme.block(shape)
    if scheme.strategy == "group" and shape[1] % block[1]:
        raise BadQuantization(
            source,
            f"{name} has {shape[1]} columns, which groups of {block[1]} do not divide; config.json is wrong.",
        )
    scales = Grid(part(source, named, f"{name}_scale", name), shape, block)
    return Compressed(
        name,
        shape,
        codes,
        8,
        checked(source, name, scales, FLOATS),
        _zeros(source, named, name, shape, scheme),
        _groups(source, named, name, shape, scheme),
    )


def _zeros(
    source: str, named: Mapping[str, Stored], name: str, shape: tuple[int, ...], scheme: Scheme
) -> Grid | None:
    """The zero points; a symmetric scheme may leave them out, or store zeros."""
    if scheme.symmetric and f"{name}_zero_point" not in named:
        return None
    stored, block = part(source, named, f"{name}_zero_point", name), scheme.block(shape)
    if stored.info.dtype != "I32":
        return checked(source, name, Grid(stored, shape, block), ZEROS)
    packed = PackedZeros(stored, shape, block, scheme.bits)
    wanted = (blocks(packed.lines[0], 32 // scheme.bits), packed.lines[1])
    if scheme.bits not in PACKED_BITS or stored.shape != wanted:
        raise BadQuantization(
            source,
            f"{stored.name} is {list(stored.shape)}, but the {scheme.bits}-bit zero points of {name} of "
            f"{list(shape)} pack into {list(wanted)}.",
        )
    return packed


def _groups(
    source: str, named: Mapping[str, Stored], name: str, shape: tuple[int, ...], scheme: Scheme
) -> Stored | None:
    """Each column's group, where columns were quantized in another order (actorder "group")."""
    stored = named.get(f"{name}_g_idx")
    if stored is None:
        return None
    if scheme.strategy != "group" or stored.info.dtype not in ("I32", "I64") or stored.shape != (shape[1],):
        raise BadQuantization(
            source,
            f"{stored.name} is {stored.info.dtype} {list(stored.shape)}, but {name} of {list(shape)} with "
            f"strategy {scheme.strategy!r} needs {shape[1]} integers for strategy 'group'.",
        )
    return stored
