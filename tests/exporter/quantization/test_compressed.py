"""exporter/quantization/compressed.py: what the compressed-tensors library decompresses, bit by bit."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

from exporter.errors import BadQuantization
from exporter.quantization.compressed import weights
from exporter.weights import Inputs, Plain, Stored
from loader.files import read_header

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
BLOCKS = {"strategy": "block", "block_structure": [16, 32]}


def settings(layout, *groups, **more):
    """quantization_config; a group is its weights' arguments, or a whole group."""
    found = [group if "weights" in group else {"targets": ["Linear"], "weights": group} for group in groups]
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {f"group_{i}": group for i, group in enumerate(found)},
        **more,
    }


def saved(folder, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return [Stored(info, folder) for info in read_header(folder / "model.safetensors")]


def found(config, stored):
    return {weight.name: weight for weight in weights("base", config, stored)}


def dequantized(weight, step=10_000):
    rows = weight.shape[0]
    with Inputs() as inputs:
        read = weight.open(inputs)
        parts = [read(at, min(at + step, rows)).clone() for at in range(0, rows, step)]
    assert all(part.dtype == torch.float32 and part.is_contiguous() for part in parts)
    return torch.cat(parts)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def random(*shape, seed=4):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def compressed(layout, arguments, shape, dtype=torch.bfloat16):
    """(tensors of a layer "a" as the library compresses it, what it decompresses them to)"""
    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    rows, columns = shape
    height, width = {
        "tensor": (rows, columns),
        "channel": (1, columns),
        "group": (1, args.group_size),
        "block": args.block_structure,
    }[args.strategy]
    grid = (-(-rows // height), -(-columns // width)) if args.strategy != "tensor" else (1,)
    state = {
        "weight": ((random(*shape) - 0.5) * 0.2).to(dtype),
        "weight_scale": (random(*grid, seed=5) * 0.01 + 0.01).to(dtype),
    }
    if not args.symmetric:
        low = -(1 << (args.num_bits - 1))
        state["weight_zero_point"] = (
            (low + random(*grid, seed=6) * (1 << args.num_bits)).floor().to(torch.int8)
        )
    compressor = BaseCompressor.get_value_from_registry(layout)
    parts = compressor.compress(state, scheme)
    expected = compressor.decompress(parts, scheme)["weight"]
    return {f"a.{name}": tensor for name, tensor in parts.items()}, expected


# Against the library


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy", ["group", "channel", "tensor"])
@pytest.mark.parametrize("num_bits", [4, 8])
def test_packed_codes_are_what_the_library_decompresses(tmp_path, num_bits, strategy, symmetric, dtype):
    arguments = {"num_bits": num_bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    arguments |= {"group_size": 32} if strategy == "group" else {}
    tensors, expected = compressed("pack-quantized", arguments, (37, 96), dtype)
    weight = found(settings("pack-quantized", arguments), saved(tmp_path, tensors))["a.weight"]
    assert weight.shape == (37, 96)
    assert weight.dtype == "F32"
    assert torch.equal(bits(dequantized(weight).to(dtype)), bits(expected))


@pytest.mark.parametrize("arguments", [INT8, INT8 | {"symmetric": False}, INT8 | {"strategy": "tensor"},
                                       INT4 | {"symmetric": False}])  # fmt: skip
@pytest.mark.parametrize("layout", ["int-quantized", "naive-quantized"])
def test_int_codes_are_what_the_library_decompresses(tmp_path, layout, arguments):
    tensors, expected = compressed(layout, arguments, (37, 96))
    assert tensors["a.weight"].dtype == torch.int8
    weight = found(settings(layout, arguments), saved(tmp_path, tensors))["a.weight"]
    assert torch.equal(bits(dequantized(weight, 5).to(torch.bfloat16)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 96), (37, 90)])
@pytest.mark.parametrize("more", [{}, {"strategy": "tensor"}, BLOCKS, BLOCKS | {"block_structure": "16x32"}])
@pytest.mark.parametrize("layout", ["float-quantized", "naive-quantized"])
def test_fp8_codes_are_what_the_library_decompresses(tmp_path, layout, more, shape, dtype):
    tensors, expected = compressed(layout, FP8 | more, shape, dtype)
    assert tensors["a.weight"].dtype == torch.float8_e4m3fn
    weight = found(settings(layout, FP8 | more), saved(tmp_path, tensors))["a.weight"]
    for step in (5, 10_000):
        assert torch.equal(bits(dequantized(weight, step).to(dtype)), bits(expected))


@pytest.mark.parametrize("step", [1, 3, 8, 11])
def test_packed_zero_points_are_found_from_any_row(tmp_path, step):
    arguments = INT4 | {"symmetric": False}
    tensors, expected = compressed("pack-quantized", arguments, (37, 64))
    assert tensors["a.weight_zero_point"].shape == (5, 4)
    weight = found(settings("pack-quantized", arguments), saved(tmp_path, tensors))["a.weight"]
    assert torch.equal(bits(dequantized(weight, step).to(torch.bfloat16)), bits(expected))


@pytest.mark.parametrize(("num_bits", "columns"), [(4, 50), (8, 49)])
def test_a_last_word_that_is_not_full_ends_where_weight_shape_says(tmp_path, num_bits, columns):
    arguments = INT8 | {"num_bits": num_bits}
    tensors, expected = compressed("pack-quantized", arguments, (9, columns))
    weight = found(settings("pack-quantized", arguments), saved(tmp_path, tensors))["a.weight"]
    assert weight.shape == (9, columns)
    assert torch.equal(bits(dequantized(weight, 4).to(torch.bfloat16)), bits(expected))


# By hand, where the library has no word any more


def packed_by_hand(order=None, zeros=None):
    """int4 [3, 32] in groups of 16, and the numbers it stands for, computed one by one."""
    codes = torch.randint(0, 16, (3, 32), generator=torch.Generator().manual_seed(7))
    words = [[sum(int(row[8 * w + i]) << (4 * i) for i in range(8)) for w in range(4)] for row in codes]
    signed = [[word - (1 << 32) if word >> 31 else word for word in row] for row in words]
    scales = torch.tensor([[0.5, 0.25], [1.0, 2.0], [0.125, 4.0]])
    order = order or [column // 16 for column in range(32)]
    offset = zeros or [[0, 0]] * 3
    expected = [
        [(int(codes[r, c]) - 8 - offset[r][order[c]]) * float(scales[r, order[c]]) for c in range(32)]
        for r in range(3)
    ]
    tensors = {
        "a.weight_packed": torch.tensor(signed, dtype=torch.int32),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([3, 32]),
    }
    return tensors, torch.tensor(expected)


def test_columns_quantized_in_another_order_use_the_scale_of_their_group(tmp_path):
    order = [1, 0] * 16
    tensors, expected = packed_by_hand(order)
    tensors["a.weight_g_idx"] = torch.tensor(order, dtype=torch.int32)
    weight = found(settings("pack-quantized", INT4), saved(tmp_path, tensors))["a.weight"]
    assert torch.equal(dequantized(weight, 2), expected)


def test_an_order_that_was_never_set_is_the_order_of_the_columns(tmp_path):
    tensors, expected = packed_by_hand()
    tensors["a.weight_g_idx"] = torch.full((32,), -1, dtype=torch.int32)
    weight = found(settings("pack-quantized", INT4), saved(tmp_path, tensors))["a.weight"]
    assert torch.equal(dequantized(weight), expected)


def test_a_group_that_does_not_exist_is_refused(tmp_path):
    tensors, _ = packed_by_hand()
    tensors["a.weight_g_idx"] = torch.full((32,), 2, dtype=torch.int32)
    weight = found(settings("pack-quantized", INT4), saved(tmp_path, tensors))["a.weight"]
    with Inputs() as inputs, pytest.raises(BadQuantization, match=r"names group 2, and a\.weight has 2"):
        weight.open(inputs)


@pytest.mark.parametrize("order", [None, [0, 1] * 16])
def test_zero_points_of_older_checkpoints_are_not_packed(tmp_path, order):
    zeros = [[-8, 7], [3, 0], [-1, 1]]
    tensors, expected = packed_by_hand(order, zeros)
    tensors["a.weight_zero_point"] = torch.tensor(zeros, dtype=torch.int8)
    if order:
        tensors["a.weight_g_idx"] = torch.tensor(order, dtype=torch.int32)
    config = settings("pack-quantized", INT4 | {"symmetric": False})
    assert torch.equal(dequantized(found(config, saved(tmp_path, tensors))["a.weight"]), expected)


# The whole checkpoint


def test_every_group_has_its_own_format_and_what_is_ignored_is_plain(tmp_path):
    int4, expected4 = compressed("pack-quantized", INT4, (16, 32))
    fp8, expected8 = compressed("float-quantized", FP8, (16, 32))
    config = settings(
        "mixed-precision",
        {"targets": ["re:.*mlp.*"], "weights": INT4, "format": "pack-quantized"},
        {"targets": ["Linear"], "weights": FP8, "format": "float-quantized"},
        {"targets": ["LlamaAttention"], "weights": None, "input_activations": {}},
        ignore=["lm_head"],
    )
    tensors = {name.replace("a.", "l.0.mlp.up."): tensor for name, tensor in int4.items()}
    tensors |= {name.replace("a.", "l.0.attn.q."): tensor for name, tensor in fp8.items()}
    tensors |= {"lm_head.weight": random(4, 32), "l.0.attn.q.bias": random(16)}
    weights_found = found(config, saved(tmp_path, tensors))
    assert sorted(weights_found) == [
        "l.0.attn.q.bias",
        "l.0.attn.q.weight",
        "l.0.mlp.up.weight",
        "lm_head.weight",
    ]
    assert torch.equal(dequantized(weights_found["l.0.mlp.up.weight"]).bfloat16(), expected4)
    assert torch.equal(dequantized(weights_found["l.0.attn.q.weight"]).bfloat16(), expected8)
    assert isinstance(weights_found["lm_head.weight"], Plain)
    assert isinstance(weights_found["l.0.attn.q.bias"], Plain)


def test_scales_of_activations_and_of_the_kv_cache_are_left_out(tmp_path):
    tensors, _ = compressed("float-quantized", FP8, (16, 32))
    for name in ("a.input_scale", "a.output_scale", "a.input_zero_point", "s.k_scale", "s.v_scale"):
        tensors[name] = torch.ones(1)
    assert list(found(settings("float-quantized", FP8), saved(tmp_path, tensors))) == ["a.weight"]


def test_shapes_on_the_hub_follow_from_headers(tmp_path):
    tensors, _ = compressed("pack-quantized", INT4 | {"group_size": 20}, (9, 60))
    remote = [replace(stored, folder=None) for stored in saved(tmp_path, tensors)]
    assert found(settings("pack-quantized", INT4 | {"group_size": 20}), remote)["a.weight"].shape == (9, 60)


def test_a_file_from_before_weight_shape_is_read_by_its_groups(tmp_path):
    tensors, expected = compressed("pack-quantized", INT4 | {"group_size": 20}, (9, 60))
    del tensors["a.weight_shape"]
    config = settings("pack-quantized", INT4 | {"group_size": 20})
    assert torch.equal(dequantized(found(config, saved(tmp_path, tensors))["a.weight"]).bfloat16(), expected)


# Refused


def pack(arguments=INT4, shape=(16, 64), **changes):
    """Tensors of a packed layer with some replaced, or with None taken out."""
    tensors = compressed("pack-quantized", arguments, shape)[0]
    tensors |= {f"a.{name}": tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


ASYMMETRIC = INT4 | {"symmetric": False}
REFUSED = [
    (INT4, pack(weight_scale=None), r"a\.weight is quantized, and there is no a\.weight_scale"),
    (
        INT4,
        pack(weight_scale=torch.ones(16, 5)),
        r"weight_scale is \[16, 5\], .*\[16, 64\].*1x16 has \[16, 4\]",
    ),
    (INT4, pack(weight_scale=torch.ones(16, 4).double()), r"weight_scale is F64"),
    (INT4, pack(weight_shape=torch.tensor([16, 72])), r"weight_shape says \[16, 72\].*16 rows of up to 64"),
    (INT4, pack(weight_shape=torch.tensor([8, 64])), r"weight_shape says \[8, 64\]"),
    (INT4, pack(weight_shape=torch.tensor([16])), r"weight_shape says \[16\]"),
    (INT4, pack(weight_shape=torch.ones(3, dtype=torch.uint8)), r"weight_shape says \[\]"),
    (INT4 | {"group_size": 48}, pack(), r"has 64 columns, which groups of 48 do not divide"),
    (INT4 | {"num_bits": 3}, pack(), r"holds 3-bit int codes"),
    (INT4, pack(weight_packed=torch.zeros(16, 8)), r"weight_packed is F32 \[16, 8\]"),
    (
        INT4,
        pack(weight_g_idx=torch.zeros(63, dtype=torch.int32)),
        r"weight_g_idx is I32 \[63\], .*64 integers",
    ),
    (ASYMMETRIC, pack(), r"there is no a\.weight_zero_point"),
    (
        ASYMMETRIC,
        pack(ASYMMETRIC, weight_zero_point=torch.zeros(3, 4, dtype=torch.int32)),
        r"pack into \[2, 4\]",
    ),
    (INT4, pack(weight_global_scale=torch.ones(1)), r"a\.weight_global_scale belongs to no weight"),
    (INT4, {"a.weight_scale": torch.ones(4)}, r"a\.weight_scale belongs to no weight"),
    (FP8, pack(), r"holds 8-bit float codes"),
    (
        INT8,
        {"a.weight": random(4, 4), "a.weight_scale": torch.ones(4, 1)},
        r"is F32 \[4, 4\].*saved compressed",
    ),
    (FP8, {"a.weight": torch.zeros(4, 4, dtype=torch.int8)}, r"is I8 \[4, 4\], where .* 8-bit float"),
]


@pytest.mark.parametrize(("arguments", "tensors", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_names_and_numbers(tmp_path, arguments, tensors, message):
    with pytest.raises(BadQuantization, match=message):
        weights("base", settings("pack-quantized", arguments), saved(tmp_path, tensors))
