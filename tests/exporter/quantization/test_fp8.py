"""exporter/quantization/fp8.py: transformers' own product where blocks are whole, by hand elsewhere."""

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import BadQuantization
from exporter.quantization.fp8 import weights
from exporter.weights import Inputs, Plain, Stored
from loader.files import read_header

BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
SMALL = {"quant_method": "fp8", "weight_block_size": [4, 6]}
FBGEMM = {"quant_method": "fbgemm_fp8"}


def saved(folder, tensors):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return [Stored(info, folder) for info in read_header(folder / "model.safetensors")]


def found(settings, stored):
    return {weight.name: weight for weight in weights("base", settings, stored)}


def dequantized(weight, step=10_000):
    rows = torch.Size(weight.shape[:-1]).numel()
    with Inputs() as inputs:
        read = weight.open(inputs)
        parts = [read(at, min(at + step, rows)).clone() for at in range(0, rows, step)]
    assert all(part.dtype == torch.float32 for part in parts)
    return torch.cat(parts).view(weight.shape)


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def codes(*shape, dtype=torch.float8_e4m3fn):
    return torch.randn(shape, generator=torch.Generator().manual_seed(8)).to(dtype)


def scales(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=torch.Generator().manual_seed(9)) + 0.1).to(dtype)


def by_hand(weight, scale, height, width):
    """Element by element, in a matrix or a stack of them."""
    if weight.ndim == 3:
        return torch.stack([by_hand(w, s, height, width) for w, s in zip(weight, scale, strict=True)])
    spread = [
        [scale[r // height, c // width].float() for c in range(weight.shape[1])]
        for r in range(weight.shape[0])
    ]
    return weight.float() * torch.tensor(spread)


@pytest.fixture(scope="module")
def transformers_product():
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return lambda weight, scale: Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)


@pytest.mark.parametrize("step", [60, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_whole_blocks_are_what_transformers_makes_of_them(tmp_path, transformers_product, dtype, step):
    weight, scale = codes(256, 384), scales(2, 3)
    scale = torch.randint(110, 130, (2, 3)).to(dtype) if dtype is torch.uint8 else scale.to(dtype)
    stored = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    read = found(BLOCK, stored)["a.weight"]
    assert (read.shape, read.dtype) == ((256, 384), "F32")
    assert torch.equal(bits(dequantized(read, step)), bits(transformers_product(weight, scale)))


@pytest.mark.parametrize("step", [1, 3, 7, 100])
@pytest.mark.parametrize("shape", [(11, 20), (8, 13), (3, 5), (9, 24)])
def test_blocks_at_the_edges_are_cut_short(tmp_path, shape, step):
    weight, scale = codes(*shape), scales(-(-shape[0] // 4), -(-shape[1] // 6))
    stored = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    assert torch.equal(dequantized(found(SMALL, stored)["a.weight"], step), by_hand(weight, scale, 4, 6))


def test_250_rows_are_two_blocks_of_128_and_not_of_125(tmp_path, transformers_product):
    weight, scale = codes(250, 16), scales(2, 1)
    stored = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    read = dequantized(found(BLOCK, stored)["a.weight"])
    assert torch.equal(read, by_hand(weight, scale, 128, 128))
    assert not torch.equal(
        read, transformers_product(weight, scale)
    )  # which takes rows 125 to 127 as the second


def test_blocks_are_128_square_where_the_config_does_not_say(tmp_path):
    weight, scale = codes(130, 132), scales(2, 2)
    stored = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    read = found({"quant_method": "fp8"}, stored)["a.weight"]
    assert torch.equal(dequantized(read), by_hand(weight, scale, 128, 128))


@pytest.mark.parametrize("step", [3, 5, 22])
def test_no_block_reaches_into_the_next_expert_of_a_stack(tmp_path, step):
    weight, scale = codes(2, 11, 12), scales(2, 3, 2)
    stored = saved(tmp_path, {"experts.gate_up_proj": weight, "experts.gate_up_proj_scale_inv": scale})
    read = found(SMALL, stored)["experts.gate_up_proj"]
    assert torch.equal(dequantized(read, step), by_hand(weight, scale, 4, 6))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_byte_is_what_torch_casts_it_to(tmp_path, dtype):
    weight = torch.arange(256, dtype=torch.uint8).view(dtype).view(16, 16)
    stored = saved(tmp_path, {"a.weight": weight, "a.weight_scale": torch.ones(1)})
    read = dequantized(found(FBGEMM, stored)["a.weight"])
    assert torch.equal(read.nan_to_num(7), weight.float().nan_to_num(7))
    assert torch.equal(read.signbit(), weight.float().signbit())


def test_ue8m0_scales_are_powers_of_two(tmp_path):
    exponents = torch.tensor([[0, 127, 130, 254]], dtype=torch.uint8)
    weight = torch.ones(1, 4).to(torch.float8_e4m3fn)
    expected = torch.tensor([[2.0**-127, 1.0, 8.0, 2.0**127]])
    for scale in (exponents, exponents.view(torch.float8_e8m0fnu)):
        stored = saved(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
        read = found({"weight_block_size": [1, 1]}, stored)["a.weight"]
        assert torch.equal(dequantized(read), expected)


@pytest.mark.parametrize(
    ("settings", "suffix"),
    [(FBGEMM, "_scale"), (BLOCK, "_scale"), ({"weight_block_size": None}, "_scale_inv")],
)
def test_a_scale_may_be_one_for_each_row_or_for_all(tmp_path, settings, suffix):
    weight = codes(5, 8)
    for scale in (scales(5, 1), scales(5), scales(1), scales(), scales(1, 1)):
        stored = saved(tmp_path, {"a.weight": weight, f"a.weight{suffix}": scale})
        read = dequantized(found(settings, stored)["a.weight"], 2)
        assert torch.equal(read, weight.float() * scale.view(-1, 1))


def test_plain_tensors_stay_and_scales_of_activations_go(tmp_path):
    tensors = {
        "a.weight": codes(4, 6),
        "a.weight_scale_inv": scales(1, 1),
        "a.bias": scales(4, dtype=torch.bfloat16),
        "a.activation_scale": scales(1),
        "a.input_scale": scales(1),
        "s.k_scale": scales(1),
    }
    read = found(SMALL, saved(tmp_path, tensors))
    assert sorted(read) == ["a.bias", "a.weight"]
    assert isinstance(read["a.bias"], Plain)
    assert [stored.name for stored in read["a.weight"].stored] == ["a.weight", "a.weight_scale_inv"]


REFUSED = [
    (
        BLOCK,
        codes(250, 128),
        "_scale_inv",
        scales(3, 1),
        r"is \[3, 1\], .*\[250, 128\].* 128x128 has \[2, 1\]",
    ),
    (BLOCK, codes(256, 128), "_scale_inv", scales(2, 2), r"is \[2, 2\]"),
    (BLOCK, codes(256, 128), "_scale_inv", scales(2), None),
    (BLOCK, codes(256, 256), "_scale_inv", scales(4), r"is \[4\]"),
    (FBGEMM, codes(4, 8), "_scale", scales(4, 2), r"is \[4, 2\], but a\.weight of \[4, 8\]"),
    (FBGEMM, codes(2, 4, 8), "_scale", scales(2, 1, 8), r"a\.weight is F8_E4M3 \[2, 4, 8\]"),
    (BLOCK, codes(4, 8), "_scale_inv", torch.ones(1, 1).double(), "is F64"),
    (BLOCK, codes(4, 8), ".scale", scales(1, 1), r"has neither a\.weight_scale_inv .* a\.weight_scale"),
    (
        BLOCK,
        torch.zeros(4, 4, dtype=torch.int8),
        "_scale_inv",
        scales(1, 1),
        r"a\.weight is I8; .* no packed fp4",
    ),
    (BLOCK, codes(4, 4, dtype=torch.float8_e4m3fnuz), "_scale_inv", scales(1, 1), "F8_E4M3FNUZ"),
    ({"weight_block_size": 128}, codes(4, 8), "_scale_inv", scales(1, 1), "weight_block_size 128"),
    ({"weight_block_size": [128]}, codes(4, 8), "_scale_inv", scales(1, 1), "weight_block_size"),
    ({"weight_block_size": [0, 8]}, codes(4, 8), "_scale_inv", scales(1, 1), "weight_block_size"),
]


@pytest.mark.parametrize(("settings", "weight", "suffix", "scale", "message"), REFUSED)
def test_what_does_not_fit_is_refused_with_numbers(tmp_path, settings, weight, suffix, scale, message):
    stored = saved(tmp_path, {"a.weight": weight, f"a.weight{suffix}": scale})
    if message is None:  # a column of scales may have lost its second dimension
        assert "a.weight" in found(settings, stored)
        return
    with pytest.raises(BadQuantization, match=message):
        weights("base", settings, stored)


def test_a_scale_without_a_weight_is_refused(tmp_path):
    with pytest.raises(BadQuantization, match=r"a\.weight_scale_inv belongs to no weight"):
        weights("base", BLOCK, saved(tmp_path, {"a.weight_scale_inv": scales(1, 1)}))
