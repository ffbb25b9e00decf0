"""exporter/quantization/bnb.py: what bitsandbytes itself computes, bit by bit."""

import json
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes import functional
from safetensors.torch import save_file

from exporter.errors import BadQuantization, NeedsDownload
from exporter.quantization.bnb import weights
from exporter.weights import Inputs, Plain, Stored
from loader.files import read_header

STATE = "a.weight.quant_state.bitsandbytes__nf4"


def saved(folder, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return [Stored(info, folder) for info in read_header(folder / "model.safetensors")]


def only_weight(stored):
    return {weight.name: weight for weight in weights("base", {}, stored)}["a.weight"]


def dequantized(weight, step=10_000):
    """The whole weight, read in blocks of `step` rows."""
    rows = torch.Size(weight.shape[:-1]).numel()
    with Inputs() as inputs:
        read = weight.open(inputs)
        parts = [read(at, min(at + step, rows)).clone() for at in range(0, rows, step)]
    assert all(part.dtype == torch.float32 for part in parts)
    return torch.cat(parts).view(weight.shape)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def numbers(*shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.02).to(dtype)


def four_bit(original, **settings):
    """(tensors of a file, what bitsandbytes makes of them)"""
    packed, state = functional.quantize_4bit(original, **settings)
    parts = {f"a.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    return {"a.weight": packed, **parts}, functional.dequantize_4bit(packed, state)


def nf4(*shape, **settings):
    return four_bit(numbers(*shape), **{"quant_type": "nf4", "blocksize": 64, **settings})[0]


def with_state(tensors, **changes):
    state = json.loads(bytes(tensors[STATE].tolist())) | changes
    return {**tensors, STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


# 4 bits


@pytest.mark.parametrize("blocksize", [32, 64, 1024])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_are_what_bitsandbytes_makes_of_them(tmp_path, kind, dtype, nested, blocksize):
    original = numbers(96, 200, dtype=dtype)  # 200: no block ends where a row does
    tensors, expected = four_bit(original, quant_type=kind, compress_statistics=nested, blocksize=blocksize)
    weight = only_weight(saved(tmp_path, tensors))
    assert weight.shape == (96, 200)
    assert weight.dtype == "F32"
    assert torch.equal(dequantized(weight).to(dtype), expected)


@pytest.mark.parametrize("step", [1, 2, 5, 61])
@pytest.mark.parametrize("shape", [[32, 61], [61, 32]])
def test_a_block_of_rows_may_begin_in_the_middle_of_a_byte_and_of_a_scale(tmp_path, shape, step):
    # Codes and scales run on across rows: the same bytes in another shape are the same numbers. On CPU
    # bitsandbytes 0.50 takes wrong scales for rows shorter than a block, and compiles code for odd columns.
    tensors, wide = four_bit(numbers(8, 244), quant_type="nf4", compress_statistics=True, blocksize=64)
    weight = only_weight(saved(tmp_path, with_state(tensors, shape=shape)))
    assert torch.equal(bits(dequantized(weight, step)), bits(wide.view(shape)))


def test_rows_longer_than_a_block_of_scales_are_read_too(tmp_path):
    tensors, expected = four_bit(numbers(3, 1000), quant_type="nf4", blocksize=64)
    assert torch.equal(dequantized(only_weight(saved(tmp_path, tensors)), 1), expected)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_codes_stored_as_wider_numbers_are_the_same_codes(tmp_path, storage):
    tensors, expected = four_bit(numbers(24, 36), quant_type="nf4", quant_storage=storage, blocksize=32)
    assert tensors["a.weight"].dtype == storage
    assert torch.equal(dequantized(only_weight(saved(tmp_path, tensors)), 5), expected)


def test_what_a_linear4bit_saves_is_read(tmp_path):
    layer = bnb.nn.Linear4bit(128, 48, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        numbers(48, 128), requires_grad=False, quant_type="nf4", compress_statistics=True
    ).to("cpu")
    tensors = {f"a.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert STATE in tensors
    expected = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    found = {weight.name: weight for weight in weights("base", {}, saved(tmp_path, tensors))}
    assert sorted(found) == ["a.bias", "a.weight"]
    assert torch.equal(dequantized(found["a.weight"]).to(expected.dtype), expected)


def test_a_block_of_rows_reads_its_own_bytes_and_scales_only(tmp_path, monkeypatch):
    tensors = nf4(64, 1024)
    weight = only_weight(saved(tmp_path, tensors))
    asked, rows = [], Inputs.rows
    monkeypatch.setattr(
        Inputs, "rows", lambda self, s, a, b: asked.append((s.name, b - a)) or rows(self, s, a, b)
    )
    with Inputs() as inputs:
        weight.open(inputs)(8, 12)
    assert sorted(asked) == [("a.weight", 4 * 1024 // 2), ("a.weight.absmax", 4 * 1024 // 64)]


def test_a_four_bit_model_on_the_hub_has_to_be_downloaded_for_its_shapes(tmp_path):
    remote = [replace(stored, folder=None) for stored in saved(tmp_path, nf4(8, 64))]
    with pytest.raises(NeedsDownload, match=r"base: .*Download the model first") as caught:
        weights("base", {}, remote)
    assert (caught.value.source, caught.value.exit_code) == ("base", 42)


def test_a_four_bit_model_that_is_broken_is_not_worth_a_download(tmp_path):
    here = saved(tmp_path, {**nf4(8, 64), STATE: torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(BadQuantization, match="is not the JSON text") as caught:
        weights("base", {}, here)
    assert not isinstance(caught.value, NeedsDownload)


def test_an_eight_bit_model_on_the_hub_needs_no_download_to_be_planned(tmp_path):
    tensors = {"a.weight": torch.zeros(8, 16, dtype=torch.int8), "a.SCB": torch.ones(8)}
    remote = [replace(stored, folder=None) for stored in saved(tmp_path, tensors)]
    assert [weight.shape for weight in weights("base", {}, remote)] == [(8, 16)]


@pytest.mark.parametrize("lost", ["absmax", "quant_map", "nested_quant_map"])
def test_a_missing_part_is_named(tmp_path, lost):
    tensors = nf4(8, 64, compress_statistics=True)
    del tensors[f"a.weight.{lost}"]
    with pytest.raises(BadQuantization, match=rf"a\.weight is quantized, and there is no a\.weight\.{lost}"):
        weights("base", {}, saved(tmp_path, tensors))


def test_a_lost_double_quantization_is_refused(tmp_path):
    tensors = nf4(8, 64, compress_statistics=True)
    del tensors["a.weight.nested_absmax"], tensors["a.weight.nested_quant_map"]
    with pytest.raises(BadQuantization, match=r"a\.weight\.absmax is U8 \[8\]; .* needs 8 of F32"):
        weights("base", {}, saved(tmp_path, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shape": [8, 128]},
            r"absmax is F32 \[8\]; a\.weight of \[8, 128\] in blocks of 64 needs 16 of F32",
        ),
        ({"shape": [8, 63]}, r"a\.weight is U8 \[256, 1\]; \[8, 63\] in 4 bits needs 252 bytes"),
        ({"shape": None}, "says shape None"),
        ({"shape": [8, -64]}, r"says shape \[8, -64\]"),
        ({"blocksize": 0}, "blocksize 0"),
        ({"nested_offset": "x"}, "nested_offset 'x'"),
    ],
)
def test_a_state_that_does_not_fit_its_tensors_is_refused(tmp_path, changes, message):
    with pytest.raises(BadQuantization, match=message):
        weights("base", {}, saved(tmp_path, with_state(nf4(8, 64), **changes)))


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"7", b"[]"])
def test_a_state_that_is_not_the_json_of_bitsandbytes_is_refused(tmp_path, text):
    tensors = {**nf4(8, 64), STATE: torch.tensor(list(text), dtype=torch.uint8)}
    with pytest.raises(BadQuantization, match="bitsandbytes__nf4"):
        weights("base", {}, saved(tmp_path, tensors))


def test_a_transposed_layout_is_refused(tmp_path):
    tensors = nf4(8, 64)
    tensors["a.weight"] = tensors["a.weight"].view(1, -1)
    with pytest.raises(
        BadQuantization, match=r"a\.weight is U8 \[1, 256\]; .* needs 256 bytes in one column"
    ):
        weights("base", {}, saved(tmp_path, tensors))


# 8 bits


def int8(rows=20, columns=48):
    codes, magnitudes, _ = functional.int8_vectorwise_quant(numbers(rows, columns, dtype=torch.float16))
    return {"a.weight": codes, "a.SCB": magnitudes, "a.weight_format": torch.tensor(0, dtype=torch.uint8)}


@pytest.mark.parametrize("step", [1, 7, 20])
def test_int8_is_what_bitsandbytes_makes_of_it(tmp_path, step):
    tensors = int8()
    expected = functional.int8_vectorwise_dequant(tensors["a.weight"], tensors["a.SCB"])
    weight = only_weight(saved(tmp_path, tensors))
    assert weight.shape == (20, 48)
    assert torch.equal(bits(dequantized(weight, step)), bits(expected))


def test_what_a_linear8bit_saves_is_read(tmp_path):
    layer = bnb.nn.Linear8bitLt(48, 20, has_fp16_weights=False)
    layer.weight = bnb.nn.Int8Params(numbers(20, 48, dtype=torch.float16), requires_grad=False)
    layer.weight._quantize("cpu")
    tensors = {f"a.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert {"a.weight", "a.SCB", "a.weight_format", "a.bias"} == set(tensors)
    found = {weight.name: weight for weight in weights("base", {}, saved(tmp_path, tensors))}
    assert sorted(found) == ["a.bias", "a.weight"]
    expected = functional.int8_vectorwise_dequant(tensors["a.weight"], tensors["a.SCB"])
    assert torch.equal(dequantized(found["a.weight"]), expected)


def test_int8_is_planned_from_headers_alone(tmp_path):
    remote = [replace(stored, folder=None) for stored in saved(tmp_path, int8())]
    assert only_weight(remote).shape == (20, 48)


def test_int8_in_the_tile_order_of_a_gpu_is_refused(tmp_path):
    tensors = int8() | {"a.weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(BadQuantization, match=r"a\.weight_format says .* not row-major"):
        weights("base", {}, saved(tmp_path, tensors))


def test_magnitudes_of_another_layer_are_refused_with_both_shapes(tmp_path):
    tensors = int8() | {"a.SCB": torch.ones(21)}
    with pytest.raises(BadQuantization, match=r"a\.SCB is \[21\], but a\.weight of \[20, 48\].* \[20, 1\]"):
        weights("base", {}, saved(tmp_path, tensors))


def test_int8_without_its_magnitudes_is_refused(tmp_path):
    with pytest.raises(BadQuantization, match=r"there is no a\.SCB"):
        weights("base", {}, saved(tmp_path, {"a.weight": int8()["a.weight"]}))


# The rest of the model


def test_bytes_saved_without_any_scales_are_refused(tmp_path):
    with pytest.raises(BadQuantization, match=r"a\.weight is U8 \[256, 1\] and has no quant_state"):
        weights("base", {}, saved(tmp_path, {"a.weight": nf4(8, 64)["a.weight"]}))


@pytest.mark.parametrize("left", ["b.SCB", "b.weight.absmax", "b.weight.quant_state.bitsandbytes__fp4"])
def test_a_scale_without_a_weight_is_refused(tmp_path, left):
    with pytest.raises(BadQuantization, match=f"{left} belongs to no weight"):
        weights("base", {}, saved(tmp_path, int8() | {left: torch.ones(3)}))


def test_what_is_not_quantized_stays_as_it_is(tmp_path):
    plain = {
        "b.weight": numbers(4, 4, dtype=torch.bfloat16),
        "a.bias": numbers(8),
        "n.steps": torch.arange(3),
    }
    found = {weight.name: weight for weight in weights("base", {}, saved(tmp_path, nf4(8, 64) | plain))}
    assert sorted(found) == ["a.bias", "a.weight", "b.weight", "n.steps"]
    assert {name for name, weight in found.items() if isinstance(weight, Plain)} == set(plain)
    assert found["b.weight"].dtype == "BF16"
