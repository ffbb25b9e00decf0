"""exporter/quantization/awq.py: bit by bit what the format says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import BadQuantization
from exporter.quantization import base_weights, grouped
from exporter.weights import Inputs, Plain, Weight
from loader.checkpoint import read_any

LAYER = "model.layers.0.mlp.up_proj"
# AutoAWQ packs these outputs, in turn, into a word's lowest four bits, the next four, ...
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def checkpoint(folder: Path, parts: dict[str, torch.Tensor], **settings: Any) -> Path:
    """A checkpoint of one quantized layer, and a norm."""
    folder.mkdir(exist_ok=True)
    tensors = {f"{LAYER}.{leaf}": tensor for leaf, tensor in parts.items()}
    save_file(tensors | {"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    settings = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True, **settings}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": settings}))
    return folder


def found(folder: Path) -> dict[str, Weight]:
    return {weight.name: weight for weight in base_weights(read_any(folder))}


def numbers(folder: Path) -> torch.Tensor:
    with Inputs() as inputs:
        weight = found(folder)[f"{LAYER}.weight"]
        return weight.open(inputs)(0, weight.shape[0]).clone()


def code(row: list[int], output: int) -> int:
    """The code of one output in a row of packed words."""
    return row[output // 8] >> (4 * ORDER.index(output % 8)) & 15


def by_hand(parts: dict[str, torch.Tensor], middle: int | None = None) -> torch.Tensor:
    """The format's formula, number by number."""
    inputs, (groups, outputs) = len(parts["qweight"]), parts["scales"].shape
    words, scales = parts["qweight"].tolist(), parts["scales"].float()
    result = torch.empty(outputs, inputs)
    for at in range(inputs):
        group = at // (inputs // groups)
        zeros = parts["qzeros"][group].tolist() if middle is None else []
        for output in range(outputs):
            zero = code(zeros, output) if middle is None else middle
            result[output, at] = float(code(words[at], output) - zero) * scales[group, output]
    return result


def random_parts(scales: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    """48 inputs in 3 groups, 40 outputs."""
    generator = torch.Generator().manual_seed(0)
    return {
        "qweight": torch.randint(-(2**31), 2**31, (48, 5), generator=generator).int(),
        "qzeros": torch.randint(-(2**31), 2**31, (3, 5), generator=generator).int(),
        "scales": (torch.rand(3, 40, generator=generator) + 0.1).to(scales),
    }


def test_a_word_holds_even_outputs_first(tmp_path: Path) -> None:
    parts = {
        "qweight": torch.tensor([[0x7654_3210], [0x1111_1111]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x1000_0000]], dtype=torch.int32),
        "scales": torch.tensor([[1, 1, 2, 1, 1, 1, 1, 0.5]], dtype=torch.float16),
    }
    weight = numbers(checkpoint(tmp_path, parts, group_size=-1))
    assert weight[:, 0].tolist() == [0, 4, 2, 5, 2, 6, 3, 3.0]
    assert weight[:, 1].tolist() == [1, 1, 2, 1, 1, 1, 1, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_number_is_bit_equal_to_the_formula(tmp_path: Path, dtype: torch.dtype) -> None:
    parts = random_parts(dtype)
    assert torch.equal(numbers(checkpoint(tmp_path, parts, group_size=16)), by_hand(parts))


def test_any_block_of_rows_is_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = random_parts()
    folder, whole = checkpoint(tmp_path, parts), by_hand(parts)
    monkeypatch.setattr(grouped, "SLAB_BYTES", 24 * 10)
    with Inputs() as inputs:
        read = found(folder)[f"{LAYER}.weight"].open(inputs)
        for start in range(40):
            for stop in (start + 1, start + 7, start + 9):
                assert torch.equal(read(start, min(stop, 40)), whole[start:stop])


def test_symmetric_codes_lie_about_the_middle(tmp_path: Path) -> None:
    parts = random_parts()
    unfilled = parts | {"qzeros": torch.zeros(3, 5, dtype=torch.int32)}
    assert torch.equal(numbers(checkpoint(tmp_path, unfilled, zero_point=False)), by_hand(parts, 8))
    assert torch.equal(numbers(checkpoint(tmp_path, parts, zero_point=False)), by_hand(parts))
    del parts["qzeros"]
    assert torch.equal(numbers(checkpoint(tmp_path, parts, zero_point=False)), by_hand(parts, 8))


def test_what_is_not_quantized_stays_as_it_is(tmp_path: Path) -> None:
    weights = found(checkpoint(tmp_path, random_parts()))
    assert weights.keys() == {f"{LAYER}.weight", "model.norm.weight"}
    assert isinstance(weights["model.norm.weight"], Plain)
    assert weights[f"{LAYER}.weight"].shape == (40, 48)


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "marlin", "llm-awq"])
def test_other_layouts_are_refused_by_name(tmp_path: Path, version: str) -> None:
    with pytest.raises(BadQuantization, match=f"AWQ in the layout '{version}'; snugfit reads 'gemm'"):
        found(checkpoint(tmp_path, random_parts(), version=version))
    with pytest.raises(BadQuantization, match=f"AWQ in the layout '{version}'"):
        found(checkpoint(tmp_path, random_parts(), version=None, format=version))
    assert found(checkpoint(tmp_path, random_parts(), version="GEMM"))


def test_other_widths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadQuantization, match="AWQ of 8 bits; snugfit reads 4"):
        found(checkpoint(tmp_path, random_parts(), bits=8))


@pytest.mark.parametrize(
    ("leaf", "cut"), [("qweight", (40, 6)), ("qzeros", (2, 5)), ("scales", (3, 32)), ("scales", (5, 40))]
)
def test_tensors_that_do_not_fit_each_other_are_named_with_their_shapes(
    tmp_path: Path, leaf: str, cut: tuple[int, int]
) -> None:
    parts = random_parts()
    with pytest.raises(BadQuantization) as err:
        found(checkpoint(tmp_path, parts | {leaf: torch.zeros(cut, dtype=parts[leaf].dtype)}))
    assert str(err.value).count("[") == 6
    assert f"{LAYER}: qweight [" in str(err.value)
    assert f"{leaf} {list(cut)}" in str(err.value)


def test_a_group_size_that_config_json_denies_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadQuantization, match=r"3 groups for 48 inputs, and config\.json says group_size 32"):
        found(checkpoint(tmp_path, random_parts(), group_size=32))


@pytest.mark.parametrize("leaf", ["qzeros", "scales"])
def test_a_layer_with_a_part_missing_is_refused(tmp_path: Path, leaf: str) -> None:
    parts = random_parts()
    del parts[leaf]
    with pytest.raises(BadQuantization, match=rf"there is no {LAYER}\.{leaf}"):
        found(checkpoint(tmp_path, parts))


def test_zero_points_without_a_weight_are_refused(tmp_path: Path) -> None:
    parts = random_parts()
    del parts["qweight"]
    with pytest.raises(BadQuantization, match=rf"{LAYER}\.qzeros belongs to no weight"):
        found(checkpoint(tmp_path, parts))


def test_a_part_of_another_dtype_is_refused(tmp_path: Path) -> None:
    parts = random_parts()
    parts["qweight"] = parts["qweight"].short()
    with pytest.raises(BadQuantization, match=rf"{LAYER}\.qweight is I16; AWQ has I32 there"):
        found(checkpoint(tmp_path, parts))
