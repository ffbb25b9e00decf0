"""Quantizes a model's folder into a GPTQ checkpoint: python -m benchmarks.gptq SOURCE OUT --bits 4.

Each weight is rounded to the nearest code of its group (no calibration): a true checkpoint in the format of
AutoGPTQ and GPTQModel, with the values that a bad quantizer gives. It is made to have something to export.
Layer by layer and in blocks of rows: a 7B takes 300 MB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from exporter.weights import Inputs, Stored, matrix
from loader import checkpoint
from loader.checkpoint import ModelSpec
from loader.headers import DTYPE_BITS, TensorInfo

SHARD_BYTES = 2_000_000_000
BLOCK_ELEMENTS = 512 * 1024
# Layers that quantizers leave alone: routers of mixtures of experts.
KEPT = ("gate", "shared_expert_gate", "router")

Header = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype, shape)


@dataclass(frozen=True)
class Options:
    bits: int = 4
    group_size: int = 128  # -1: one group
    symmetric: bool = True
    desc_act: bool = False  # inputs go to groups in a shuffled order
    v2: bool = False  # zero points as they are, not less one
    lm_head: bool = False
    g_idx: bool = True  # written at all
    phantom_biases: bool = False  # zeros for every quantized layer without a bias
    checkpoint_format: str | None = None  # what config.json says, where that is not the truth
    dtype: torch.dtype = torch.float16  # of the scales


def quantize(source: Path, out: Path, options: Options, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the model in `source` quantized into `out`, with its tokenizer and the like, and return `out`."""
    spec = checkpoint.read(source)
    out.mkdir(parents=True, exist_ok=True)
    layers = {t.name.removesuffix(".weight"): t.shape for t in spec.tensors if _is_quantized(t, options)}
    packed = list(_shards(list(_header(spec, layers, options)), shard_bytes))
    weight_map: dict[str, str] = {}
    with Inputs() as inputs:
        tensors = _tensors(spec, inputs, layers, options)
        for number, header in enumerate(packed, 1):
            file = (
                f"model-{number:05d}-of-{len(packed):05d}.safetensors"
                if len(packed) > 1
                else "model.safetensors"
            )
            _write_shard(out / file, header, tensors)
            weight_map |= {name: file for name, _, _ in header}
    if len(packed) > 1:
        total = sum(_n_bytes(*tensor[1:]) for header in packed for tensor in header)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (out / "config.json").write_text(
        json.dumps({**spec.config, "quantization_config": settings(options)}, indent=1)
    )
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.startswith("model"):
            shutil.copy(path, out)
    return out


def settings(options: Options) -> dict[str, Any]:
    """quantization_config, as GPTQModel writes it."""
    label = "gptq_v2" if options.v2 else "gptq"
    return {
        "quant_method": "gptq",
        "checkpoint_format": options.checkpoint_format or label,
        "bits": options.bits,
        "group_size": options.group_size,
        "desc_act": options.desc_act,
        "sym": options.symmetric,
        "lm_head": options.lm_head,
    }


# One layer


def groups_of(inputs: int, options: Options, seed: int = 0) -> torch.Tensor:
    """g_idx: the group of each input, int32."""
    size = inputs if options.group_size == -1 else options.group_size
    in_order = torch.arange(inputs, dtype=torch.int32) // size
    if not options.desc_act:
        return in_order
    generator = torch.Generator().manual_seed(seed)
    return in_order[torch.randperm(inputs, generator=generator)]


def layer(weight: torch.Tensor, options: Options, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a linear layer of weight [outputs, inputs]; both multiples of 32."""
    outputs, inputs = weight.shape
    rows = _Rows(outputs, inputs, options, seed)
    rows.add(0, weight)
    return rows.tensors()


class _Rows:
    """The tensors of one layer, filled in blocks of rows."""

    def __init__(self, outputs: int, inputs: int, options: Options, seed: int) -> None:
        self._options = options
        self._groups = groups_of(inputs, options, seed)
        n_groups = int(self._groups.max()) + 1
        self._order = torch.argsort(self._groups, stable=True) if options.desc_act else None
        self._size = inputs if options.group_size == -1 else options.group_size
        self._qweight = torch.empty((inputs * options.bits // 32, outputs), dtype=torch.int32)
        self._zeros = torch.empty((n_groups, outputs), dtype=torch.uint8)
        self._scales = torch.empty((n_groups, outputs), dtype=options.dtype)

    def add(self, start: int, block: torch.Tensor) -> None:
        """Rows of the weight, from `start` on."""
        rows, inputs = block.shape
        by_group = block.float()
        if self._order is not None:
            by_group = by_group[:, self._order]
        padding = -inputs % self._size  # of the last group, with values that change no range
        if padding:
            by_group = torch.nn.functional.pad(by_group, (0, padding), mode="replicate")
        by_group = by_group.view(rows, -1, self._size)
        codes, zeros, scales = round_to_nearest(by_group, self._options)
        codes = codes.view(rows, -1)[:, :inputs]
        if self._order is not None:
            codes = torch.empty_like(codes).index_copy_(1, self._order, codes)
        words = pack(codes.contiguous(), self._options.bits).view(torch.int32)
        self._qweight[:, start : start + rows] = words.t()
        self._zeros[:, start : start + rows] = zeros.t()
        self._scales[:, start : start + rows] = scales.t()

    def tensors(self) -> dict[str, torch.Tensor]:
        bits = self._options.bits
        stored = self._zeros
        if not self._options.v2:
            stored = (stored.int() - 1).bitwise_and_((1 << bits) - 1).to(torch.uint8)
        qzeros = pack(stored, bits).view(torch.int32)
        found = {"qweight": self._qweight, "qzeros": qzeros, "scales": self._scales}
        return found | ({"g_idx": self._groups} if self._options.g_idx else {})


def round_to_nearest(
    by_group: torch.Tensor, options: Options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [rows, groups, size] -> codes as they are, zero points and scales [rows, groups]."""
    top = (1 << options.bits) - 1
    low, high = by_group.amin(2).clamp_(max=0), by_group.amax(2).clamp_(min=0)
    if options.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).to(options.dtype)
    scales[scales == 0] = 1
    zeros = torch.full_like(low, (top + 1) // 2) if options.symmetric else (-low / scales.float()).round_()
    zeros.clamp_(0 if options.v2 else 1, top)  # GPTQModel's v1 borrows for a 0, which is not shown here
    codes = (by_group / scales.float().unsqueeze(2)).round_().add_(zeros.unsqueeze(2)).clamp_(0, top)
    return codes.to(torch.uint8), zeros.to(torch.uint8), scales


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, n] -> [rows, n * bits / 8] bytes, the first code in the lowest bits; 32 divides n."""
    if bits == 8:
        return codes
    if bits == 3:
        wide = codes.view(torch.int64)
        for shift, mask in ((5, 0x003F_003F_003F_003F), (10, 0x0000_0FFF_0000_0FFF), (20, 0xFF_FFFF)):
            wide = (wide | wide >> shift) & mask
        return wide.view(torch.uint8).view(len(codes), -1, 8)[:, :, :3].reshape(len(codes), -1)
    wide = codes.view({2: torch.int32, 4: torch.int16}[bits])
    for shift, mask in {2: ((6, 0x000F_000F), (12, 0xFF)), 4: ((4, 0xFF),)}[bits]:
        wide = (wide | wide >> shift) & mask
    return wide.to(torch.uint8)


# The checkpoint


def _is_quantized(tensor: TensorInfo, options: Options) -> bool:
    parts = tensor.name.split(".")
    if parts[-1] != "weight" or len(tensor.shape) != 2 or parts[-2] in KEPT:
        return False
    if parts[-2] == "lm_head":
        return options.lm_head
    return "layers" in parts or "h" in parts


def _header(
    spec: ModelSpec, layers: dict[str, tuple[int, ...]], options: Options
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Every tensor of the output, in the order of the source's."""
    names = {tensor.name for tensor in spec.tensors}
    scales = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}[options.dtype]
    for tensor in spec.tensors:
        name = tensor.name.removesuffix(".weight")
        if name == tensor.name or name not in layers:
            yield tensor.name, tensor.dtype, tensor.shape
            continue
        outputs, inputs = tensor.shape
        n_groups = 1 if options.group_size == -1 else -(-inputs // options.group_size)
        yield f"{name}.qweight", "I32", (inputs * options.bits // 32, outputs)
        yield f"{name}.qzeros", "I32", (n_groups, outputs * options.bits // 32)
        yield f"{name}.scales", scales, (n_groups, outputs)
        if options.g_idx:
            yield f"{name}.g_idx", "I32", (inputs,)
        if options.phantom_biases and f"{name}.bias" not in names:
            yield f"{name}.bias", scales, (outputs,)


def _tensors(
    spec: ModelSpec, inputs: Inputs, layers: dict[str, tuple[int, ...]], options: Options
) -> Iterator[torch.Tensor]:
    """The tensors that `_header` names, in turn; those that stay as they are in blocks of rows."""
    names = {tensor.name for tensor in spec.tensors}
    for seed, info in enumerate(spec.tensors):
        stored, name = Stored(info, spec.path), info.name.removesuffix(".weight")
        if name == info.name or name not in layers:
            yield from _blocks(inputs, stored)
            continue
        rows, start = _Rows(*info.shape, options, seed), 0
        for block in _blocks(inputs, stored):
            rows.add(start, block)
            start += len(block)
        yield from rows.tensors().values()
        if options.phantom_biases and f"{name}.bias" not in names:
            yield torch.zeros(info.shape[0], dtype=options.dtype)


def _blocks(inputs: Inputs, stored: Stored) -> Iterator[torch.Tensor]:
    rows, columns = matrix(stored.shape)
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield inputs.rows(stored, start, min(rows, start + step))


def _shards(header: Header, shard_bytes: int) -> Iterator[Header]:
    """The tensors in order, in lists of at most so many bytes. A layer may be split over two."""
    part: Header = []
    used = 0
    for tensor in header:
        if part and used + _n_bytes(*tensor[1:]) > shard_bytes:
            yield part
            part, used = [], 0
        part.append(tensor)
        used += _n_bytes(*tensor[1:])
    yield part


def _n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BITS[dtype] // 8


def _write_shard(path: Path, header: Header, tensors: Iterator[torch.Tensor]) -> None:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in header:
        start, end = end, end + _n_bytes(dtype, shape)
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(content).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        first = stream.tell()
        while stream.tell() < first + end:
            stream.write(memoryview(next(tensors).contiguous().view(-1).view(torch.uint8).numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--group-size", type=int, default=128, help="-1: one group")
    parser.add_argument("--asymmetric", dest="symmetric", action="store_false")
    for flag in ("desc-act", "v2", "lm-head", "phantom-biases"):
        parser.add_argument(f"--{flag}", action="store_true")
    args = vars(parser.parse_args())
    source, out = args.pop("source"), args.pop("out")
    torch.set_num_threads(
        1
    )  # blocks are too small to share: on a busy machine threads wait more than they work
    print(quantize(source, out, Options(**args)))


if __name__ == "__main__":
    main()
