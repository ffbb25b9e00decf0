"""exporter/quantization/gptq.py: bit by bit what the format says, however the checkpoint came about."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import gptq as writer
from benchmarks.make_model import make
from exporter.errors import BadQuantization
from exporter.quantization import base_weights, gptq, grouped
from exporter.quantization.bitfields import unpack
from exporter.weights import Inputs, Plain, Weight
from loader.checkpoint import read_any

LAYER = "model.layers.0.mlp.up_proj"
SCALES = (torch.float16, torch.bfloat16, torch.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("tiny", tmp_path_factory.mktemp("model") / "tiny")


def checkpoint(folder: Path, parts: dict[str, torch.Tensor], name: str = LAYER, **settings: Any) -> Path:
    """A checkpoint of one quantized layer."""
    folder.mkdir(exist_ok=True)
    save_file({f"{name}.{leaf}": tensor for leaf, tensor in parts.items()}, folder / "model.safetensors")
    config = {"model_type": "qwen2", "quantization_config": {"quant_method": "gptq", **settings}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def numbers(folder: Path, name: str = LAYER) -> torch.Tensor:
    """The weight of a layer, whole."""
    with Inputs() as inputs:
        weight = found(folder)[f"{name}.weight"]
        return weight.open(inputs)(0, weight.shape[0]).clone()


def found(folder: Path) -> dict[str, Weight]:
    return {weight.name: weight for weight in base_weights(read_any(folder))}


def fields(words: list[int], bits: int) -> list[int]:
    """The numbers of `bits` bits in a stream of 32-bit words, each word with its lowest bit first."""
    stream = sum((word & 0xFFFF_FFFF) << (32 * at) for at, word in enumerate(words))
    return [stream >> start & ((1 << bits) - 1) for start in range(0, 32 * len(words), bits)]


def by_hand(parts: dict[str, torch.Tensor], bits: int, less_one: bool) -> torch.Tensor:
    """The format's formula, number by number."""
    outputs, groups = parts["qweight"].shape[1], parts["g_idx"].tolist()
    zeros = [fields(row, bits) for row in parts["qzeros"].tolist()]
    scales, columns = parts["scales"].float(), parts["qweight"].t().tolist()
    result = torch.empty(outputs, len(groups))
    for output, column in enumerate(columns):
        codes = fields(column, bits)
        for at, group in enumerate(groups):
            zero = (zeros[group][output] + less_one) % (1 << bits)
            result[output, at] = float(codes[at] - zero) * scales[group, output]
    return result


def random_parts(
    bits: int, less_one: bool, groups: int = 3, scales: torch.dtype = torch.float16
) -> dict[str, torch.Tensor]:
    """64 inputs, 32 outputs; any codes, and zero points in the middle of them."""
    generator = torch.Generator().manual_seed(bits)
    middle = 1 << (bits - 1)
    zeros = torch.randint(middle - 1, middle + 1, (groups, 32), generator=generator)
    return {
        "qweight": torch.randint(-(2**31), 2**31, (2 * bits, 32), generator=generator).int(),
        "qzeros": writer.pack((zeros - int(less_one)).to(torch.uint8), bits).view(torch.int32),
        "scales": (torch.rand(groups, 32, generator=generator) + 0.1).to(scales),
        "g_idx": torch.randint(0, groups, (64,), generator=generator).int(),
    }


def test_a_layer_written_out_by_hand_comes_back(tmp_path: Path) -> None:
    parts = {
        "qweight": torch.tensor([[0x7654_3210] * 7 + [0x0123_4567]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x7777_7777]], dtype=torch.int32),
        "scales": torch.tensor([[1, 2, 1, 1, 1, 1, 1, 0.5]], dtype=torch.float16),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    weight = numbers(checkpoint(tmp_path, parts, bits=4, group_size=-1))
    ramp = torch.arange(8.0) - 8
    assert torch.equal(weight[0], ramp)
    assert torch.equal(weight[1], 2 * ramp)
    assert torch.equal(weight[7], 0.5 * ramp.flip(0))


@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_order_of_groups_is_bit_equal_to_the_formula(
    tmp_path: Path, bits: int, less_one: bool
) -> None:
    label = "gptq" if less_one else "gptq_v2"
    for dtype in SCALES:
        parts = random_parts(bits, less_one, scales=dtype)
        folder = checkpoint(tmp_path, parts, bits=bits, group_size=32, desc_act=True, checkpoint_format=label)
        assert torch.equal(numbers(folder), by_hand(parts, bits, less_one)), dtype


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_in_order_need_no_g_idx(tmp_path: Path, groups: int) -> None:
    parts = random_parts(4, True, groups)
    parts["g_idx"] = (torch.arange(64) // (64 // groups)).int()
    expected = by_hand(parts, 4, True)
    assert torch.equal(numbers(checkpoint(tmp_path, parts)), expected)
    del parts["g_idx"]
    assert torch.equal(numbers(checkpoint(tmp_path, parts, group_size=64 // groups)), expected)
    assert torch.equal(numbers(checkpoint(tmp_path, parts)), expected)


def test_a_last_group_may_be_smaller(tmp_path: Path) -> None:
    parts = random_parts(4, True, 3)
    parts["g_idx"] = (torch.arange(64) // 30).int()
    expected = by_hand(parts, 4, True)
    assert torch.equal(numbers(checkpoint(tmp_path, parts)), expected)
    del parts["g_idx"]
    assert torch.equal(numbers(checkpoint(tmp_path, parts, group_size=30)), expected)
    with pytest.raises(BadQuantization, match=r"3 groups for 64 inputs and no g_idx, and group_size 64"):
        found(checkpoint(tmp_path, parts, group_size=64))


def test_a_g_idx_of_zeros_means_that_nothing_was_reordered(tmp_path: Path) -> None:
    parts = random_parts(4, True, 2)
    expected = by_hand(parts | {"g_idx": torch.arange(64) // 32}, 4, True)
    parts["g_idx"] = torch.zeros(64, dtype=torch.int32)
    assert torch.equal(numbers(checkpoint(tmp_path, parts)), expected)


def test_a_group_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    parts = random_parts(4, True, 3)
    for wrong in (3, -1):
        parts["g_idx"][17] = wrong
        folder = checkpoint(tmp_path, parts)
        with pytest.raises(BadQuantization, match=rf"{LAYER}\.g_idx .*{wrong}.* there are 3 .*\[3, 32\]"):
            numbers(folder)


def test_any_block_of_rows_is_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(160, 64, generator=torch.Generator().manual_seed(0))
    for bits, shuffled in itertools.product((3, 4), (False, True)):
        options = writer.Options(bits=bits, group_size=32, desc_act=shuffled)
        folder = checkpoint(tmp_path, writer.layer(weight, options), bits=bits)
        whole = numbers(folder)
        monkeypatch.setattr(grouped, "SLAB_BYTES", 64 * 40)
        with Inputs() as inputs:
            read = found(folder)[f"{LAYER}.weight"].open(inputs)
            for start, stop in ((0, 5), (5, 70), (0, 1), (63, 65), (150, 160), (7, 7)):
                assert torch.equal(read(start, stop), whole[start:stop]), (bits, shuffled, start)
        monkeypatch.undo()


def test_a_big_matrix_is_read_in_slabs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(Inputs):
        most_bytes = 0

        def tensor(self, stored: Any) -> torch.Tensor:
            return self._seen(super().tensor(stored))

        def columns(self, stored: Any, start: int, stop: int) -> torch.Tensor:
            return self._seen(super().columns(stored, start, stop))

        def _seen(self, read: torch.Tensor) -> torch.Tensor:
            self.most_bytes = max(self.most_bytes, read.nbytes)
            return read

    monkeypatch.setattr(grouped, "SLAB_BYTES", 4096)
    parts = writer.layer(torch.randn(640, 128), writer.Options(group_size=32))
    weight = found(checkpoint(tmp_path, parts))[f"{LAYER}.weight"]
    with Counted() as inputs:
        read = weight.open(inputs)
        rows = torch.cat([read(start, start + 20).clone() for start in range(0, 640, 20)])
        assert parts["qweight"].nbytes == 40_960
        assert inputs.most_bytes <= 4096 * 1.5
    assert torch.equal(rows, numbers(tmp_path))


# Zero points


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_zero_points_decide_and_not_the_label(
    tmp_path: Path, model: Path, bits: int, symmetric: bool
) -> None:
    weights = []
    for v2, label in itertools.product((False, True), ("gptq", "gptq_v2")):
        options = writer.Options(
            bits=bits, group_size=32, symmetric=symmetric, v2=v2, checkpoint_format=label
        )
        folder = writer.quantize(model, tmp_path / f"{v2}{label}", options)
        weights.append(numbers(folder))
        with Inputs() as inputs:
            note = gptq.note(list(found(folder).values()), inputs)
        assert (note is None) == (label == ("gptq_v2" if v2 else "gptq"))
    assert all(torch.equal(weights[0], other) for other in weights[1:])


def test_symmetric_8_bits_are_told_apart_too(tmp_path: Path, model: Path) -> None:
    for v2 in (False, True):
        options = writer.Options(bits=8, group_size=32, v2=v2, checkpoint_format="gptq" if v2 else "gptq_v2")
        folder = writer.quantize(model, tmp_path / str(v2), options)
        original = load_file(next(model.glob("*.safetensors")))[f"{LAYER}.weight"].float()
        assert (numbers(folder) - original).abs().max() < original.abs().max() / 200


def test_where_numbers_do_not_tell_the_label_does(tmp_path: Path) -> None:
    parts = random_parts(8, True)
    for label, less_one in (("gptq", True), ("gptq_v2", False)):
        folder = checkpoint(tmp_path, parts, checkpoint_format=label)
        assert torch.equal(numbers(folder), by_hand(parts, 8, less_one))


def test_layers_that_follow_both_ways_are_refused(tmp_path: Path) -> None:
    weight, other = torch.randn(32, 64), "model.layers.1.mlp.up_proj"
    tensors = {f"{LAYER}.{leaf}": part for leaf, part in writer.layer(weight, writer.Options()).items()}
    v2 = writer.layer(weight, writer.Options(v2=True))
    folder = checkpoint(tmp_path, {})
    save_file(tensors | {f"{other}.{leaf}": part for leaf, part in v2.items()}, folder / "model.safetensors")
    with pytest.raises(BadQuantization, match=rf"{LAYER} are stored less one .* {other} as they are"):
        numbers(folder)


def test_a_zero_point_of_0_gives_back_what_it_borrowed(tmp_path: Path) -> None:
    # As GPTQModel turns v2 into v1: one is subtracted from each zero point of a word at once.
    zeros = torch.full((1, 32), 8, dtype=torch.uint8)
    zeros[0, 3], zeros[0, 20] = 0, 9
    words = writer.pack(zeros, 4).view(torch.int32)
    parts = random_parts(4, True, 1) | {"qzeros": words - 0x1111_1111}
    assert fields(parts["qzeros"][0].tolist(), 4)[2:5] == [7, 15, 6]
    v2 = by_hand(parts | {"qzeros": words}, 4, False)
    assert torch.equal(numbers(checkpoint(tmp_path, parts)), v2)


# Whole checkpoints


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_quantized_model_is_the_model_within_half_a_step(tmp_path: Path, model: Path, bits: int) -> None:
    original = load_file(next(model.glob("*.safetensors")))
    for symmetric, shuffled, size in ((True, True, 32), (False, False, 32), (False, True, -1)):
        options = writer.Options(bits, size, symmetric, shuffled, lm_head=True)
        weights = found(writer.quantize(model, tmp_path / "out", options))
        assert weights.keys() == original.keys()
        with Inputs() as inputs:
            for name, weight in weights.items():
                assert weight.shape == original[name].shape
                if not isinstance(weight, Plain):
                    error = (weight.open(inputs)(0, weight.shape[0]) - original[name].float()).abs()
                    step = inputs.tensor(weight.stored[2]).float().max()
                    # Symmetric codes reach one step less far up than down: the largest is cut by half a step.
                    assert error.max() <= step * (1.01 if symmetric else 0.51), (name, options)


def test_embeddings_norms_and_biases_stay_as_they_are(tmp_path: Path, model: Path) -> None:
    weights = found(writer.quantize(model, tmp_path / "out", writer.Options(group_size=32)))
    plain = {name for name, weight in weights.items() if isinstance(weight, Plain)}
    assert plain == {name for name in weights if "proj.weight" not in name}
    assert len(weights) - len(plain) == 14


def test_a_quantized_head_is_read(tmp_path: Path) -> None:
    parts = random_parts(4, True, 2)
    folder = checkpoint(tmp_path, parts, "lm_head")
    assert torch.equal(numbers(folder, "lm_head"), by_hand(parts, 4, True))


def test_a_layer_may_be_split_over_shards(tmp_path: Path, model: Path) -> None:
    options = writer.Options(group_size=32)
    whole = found(writer.quantize(model, tmp_path / "one", options))
    split = found(writer.quantize(model, tmp_path / "many", options, shard_bytes=5000))
    assert any(len({stored.info.file for stored in weight.stored}) > 1 for weight in split.values())
    with Inputs() as inputs:
        for name, weight in whole.items():
            rows = weight.open(inputs)(0, 1).clone()
            assert torch.equal(split[name].open(inputs)(0, 1), rows)


def test_planning_reads_no_tensor(tmp_path: Path, model: Path) -> None:
    folder = writer.quantize(model, tmp_path / "out", writer.Options(group_size=32))
    spec = read_any(folder)
    shutil.rmtree(folder)
    assert len(base_weights(spec)) == len(read_any(model).tensors)


def test_layers_of_another_width_are_read_as_their_tensors_are(tmp_path: Path) -> None:
    parts = random_parts(8, True, 2)
    del parts["g_idx"]
    dynamic = {r"-:.*\.down_proj": {}, r"+:.*\.up_proj": {"bits": 8, "group_size": 32}, ".*": {"bits": 2}}
    folder = checkpoint(tmp_path, parts, bits=4, group_size=128, dynamic=dynamic)
    parts["g_idx"] = torch.arange(64) // 32
    assert torch.equal(numbers(folder), by_hand(parts, 8, True))


# What is refused

CUT = {
    "qzeros": torch.zeros(3, 3, dtype=torch.int32),
    "scales": torch.zeros(3, 31, dtype=torch.float16),
    "g_idx": torch.zeros(63, dtype=torch.int32),
}


@pytest.mark.parametrize("leaf", CUT)
def test_tensors_that_do_not_fit_each_other_are_named_with_their_shapes(tmp_path: Path, leaf: str) -> None:
    parts = random_parts(4, True) | {leaf: CUT[leaf]}
    with pytest.raises(BadQuantization) as err:
        found(checkpoint(tmp_path, parts))
    assert f"{LAYER}: qweight [8, 32]" in str(err.value)
    assert f"{leaf} {list(CUT[leaf].shape)}" in str(err.value)


@pytest.mark.parametrize("leaf", ["qzeros", "scales"])
def test_a_layer_with_a_part_missing_is_refused(tmp_path: Path, leaf: str) -> None:
    parts = random_parts(4, True)
    del parts[leaf]
    with pytest.raises(BadQuantization, match=rf"{LAYER} .*there is no {LAYER}\.{leaf}"):
        found(checkpoint(tmp_path, parts))


def test_zero_points_without_a_weight_are_refused(tmp_path: Path) -> None:
    parts = random_parts(4, True)
    del parts["qweight"], parts["g_idx"]
    with pytest.raises(BadQuantization, match=rf"{LAYER}\.qzeros belongs to no weight"):
        found(checkpoint(tmp_path, parts))


def test_a_part_of_another_dtype_is_refused(tmp_path: Path) -> None:
    parts = random_parts(4, True)
    parts["qweight"] = parts["qweight"].long()
    with pytest.raises(BadQuantization, match=rf"{LAYER}\.qweight is I64; GPTQ has I32 there"):
        found(checkpoint(tmp_path, parts))


def test_a_width_that_config_json_denies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadQuantization, match=r"codes of 8 bits, and config.json says 4 \(quant"):
        found(checkpoint(tmp_path, random_parts(8, True), bits=4))


@pytest.mark.parametrize("packing", ["marlin", "gptq_p", "bitblas", "qqq"])
def test_other_packings_are_refused_by_name(tmp_path: Path, packing: str) -> None:
    folder = checkpoint(tmp_path, random_parts(4, True), checkpoint_format=packing)
    with pytest.raises(BadQuantization, match=f"packed as '{packing}'; snugfit reads gptq and gptq_v2"):
        found(folder)
    folder = checkpoint(tmp_path, random_parts(4, True), is_marlin_format=True)
    with pytest.raises(BadQuantization, match="packed as 'marlin'"):
        found(folder)


def test_widths_packed_in_planes_are_refused(tmp_path: Path) -> None:
    parts = random_parts(4, True) | {"qzeros": torch.zeros(3, 5, dtype=torch.int32)}
    with pytest.raises(BadQuantization, match=rf"{LAYER} has 5-bit codes, packed in planes \(gptq_p\)"):
        found(checkpoint(tmp_path, parts))


def test_a_pattern_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, random_parts(4, True), dynamic={"+:(": {"group_size": 32}})
    with pytest.raises(BadQuantization, match=r"'\+:\(', which is no pattern"):
        found(folder)


def test_a_model_with_transposed_weights_is_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, random_parts(4, True))
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "gpt2"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BadQuantization, match="a gpt2 in gptq, and 16-bit ones have their weights transposed"
    ):
        found(folder)


def test_the_writer_packs_what_the_reader_unpacks() -> None:
    for bits in (2, 3, 4, 8):
        codes = torch.randint(0, 1 << bits, (5, 96), dtype=torch.uint8)
        packed = writer.pack(codes, bits)
        words = packed.view(torch.int32)[2].tolist()
        assert fields(words, bits) == codes[2].tolist()
        assert torch.equal(unpack(packed, bits), codes)
