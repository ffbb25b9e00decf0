"""exporter/quantization/detect.py: which format a checkpoint is in, by its tensors and its config."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest

from exporter.errors import BadQuantization
from exporter.quantization import base_weights, detect, method
from exporter.weights import Plain, Stored, Weight
from loader.checkpoint import ModelSpec, read_any
from loader.headers import DTYPE_BITS

AT = "model.layers.0.mlp.up_proj"
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

BF16: Tensors = {f"{AT}.weight": ("BF16", (32, 64))}
GPTQ: Tensors = {
    f"{AT}.qweight": ("I32", (8, 32)), f"{AT}.qzeros": ("I32", (2, 4)), f"{AT}.scales": ("F16", (2, 32)),
}  # fmt: skip
AWQ: Tensors = {
    f"{AT}.qweight": ("I32", (64, 4)), f"{AT}.qzeros": ("I32", (2, 4)), f"{AT}.scales": ("F16", (2, 32)),
}  # fmt: skip
NF4: Tensors = {f"{AT}.weight": ("U8", (1024, 1)), f"{AT}.weight.absmax": ("F32", (32,))}
INT8: Tensors = {f"{AT}.weight": ("I8", (32, 64)), f"{AT}.SCB": ("F32", (32,))}
PACKED: Tensors = {f"{AT}.weight_packed": ("I32", (32, 8)), f"{AT}.weight_scale": ("BF16", (32, 1))}
CODES: Tensors = {f"{AT}.weight": ("I8", (32, 64)), f"{AT}.weight_scale": ("BF16", (32, 1))}
FP8: Tensors = {f"{AT}.weight": ("F8_E4M3", (32, 64)), f"{AT}.weight_scale_inv": ("F32", (1, 1))}
FP8_ROWS: Tensors = {f"{AT}.weight": ("F8_E4M3", (32, 64)), f"{AT}.weight_scale": ("F32", (32, 1))}


def write(folder: Path, tensors: Tensors, **config: Any) -> ModelSpec:
    """A checkpoint whose tensors are zeros that take no disk."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", **config}))
    return read_any(folder)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Mapping[str, Any]]]:
    """(module, settings) of every format that was asked for weights."""
    asked: list[tuple[str, Mapping[str, Any]]] = []

    class Format:
        def __init__(self, name: str) -> None:
            self.name = name

        def weights(
            self, source: str, settings: Mapping[str, Any], tensors: Sequence[Stored]
        ) -> list[Weight]:
            asked.append((self.name.rpartition(".")[2], settings))
            return []

    monkeypatch.setattr(detect, "import_module", Format)
    return asked


FORMATS = [
    ("gptq", GPTQ, "gptq"), ("awq", AWQ, "awq"), ("bitsandbytes", NF4, "bnb"), ("bitsandbytes", INT8, "bnb"),
    ("compressed-tensors", PACKED, "compressed"), ("compressed-tensors", CODES, "compressed"),
    ("compressed-tensors", FP8_ROWS, "compressed"), ("fp8", FP8, "fp8"), ("fbgemm_fp8", FP8_ROWS, "fp8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "tensors", "module"), FORMATS)
def test_the_format_is_the_one_that_config_and_tensors_agree_on(
    tmp_path: Path, chosen: list[Any], name: str, tensors: Tensors, module: str
) -> None:
    settings = {"quant_method": name}
    base_weights(write(tmp_path, tensors, quantization_config=settings))
    base_weights(write(tmp_path, tensors, text_config={"quantization_config": settings}))
    assert chosen == [(module, settings), (module, settings)]


@pytest.mark.parametrize(
    ("tensors", "module"),
    [(GPTQ, "gptq"), (AWQ, "awq"), (NF4, "bnb"), (INT8, "bnb"), (PACKED, "compressed"), (FP8, "fp8")],
)
def test_without_a_config_the_tensors_tell(
    tmp_path: Path, chosen: list[Any], tensors: Tensors, module: str
) -> None:
    base_weights(write(tmp_path, tensors))
    assert chosen == [(module, {})]


def test_older_configs_are_understood(tmp_path: Path, chosen: list[Any]) -> None:
    base_weights(write(tmp_path, NF4, quantization_config={"load_in_4bit": True}))
    base_weights(write(tmp_path, PACKED, compression_config={"config_groups": {}}))
    base_weights(write(tmp_path, PACKED, compression_config={"quant_method": "compressed-tensors"}))
    assert [name for name, _ in chosen] == ["bnb", "compressed", "compressed"]


def test_autoround_packs_as_gptq_or_awq(tmp_path: Path) -> None:
    for packing, tensors in (("auto_round:auto_gptq", GPTQ), ("auto_round:auto_awq", AWQ), (None, GPTQ)):
        settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "packing_format": packing}
        weights = base_weights(write(tmp_path, tensors, quantization_config=settings))
        assert [(w.name, w.shape, w.dtype) for w in weights] == [(f"{AT}.weight", (32, 64), "F32")]
    settings["packing_format"] = "auto_round:nv_fp"
    with pytest.raises(BadQuantization, match="AutoRound packed it as 'auto_round:nv_fp'"):
        base_weights(write(tmp_path, GPTQ, quantization_config=settings))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_a_model_that_is_not_quantized_is_plain(tmp_path: Path, dtype: str) -> None:
    tensors = {
        f"{AT}.weight": (dtype, (32, 64)),
        "model.position_ids": ("I64", (1, 64)),
        "h.0.attn.bias": ("U8", (1, 1, 8, 8)),
    }
    for config in ({}, {"quantization_config": None}, {"quantization_config": {}}):
        spec = write(tmp_path, tensors, **config)
        weights = base_weights(spec)
        assert all(isinstance(weight, Plain) for weight in weights)
        assert [weight.name for weight in weights] == list(tensors)
        assert method(spec) is None


def test_a_config_that_outlived_its_quantization_is_passed_over(tmp_path: Path) -> None:
    spec = write(tmp_path, BF16, quantization_config={"quant_method": "gptq", "bits": 4})
    assert [type(weight) for weight in base_weights(spec)] == [Plain]
    assert method(spec) is None


@pytest.mark.parametrize("name", ["hqq", "eetq", "aqlm", "mxfp4", "nvfp4", "modelopt", "torchao", "quanto"])
def test_other_methods_are_refused_by_name(tmp_path: Path, name: str) -> None:
    for tensors in (BF16, GPTQ):
        spec = write(tmp_path, tensors, quantization_config={"quant_method": name})
        with pytest.raises(
            BadQuantization, match=f"quantized with '{name}' .*; snugfit reads gptq, awq, bits"
        ):
            base_weights(spec)
        with pytest.raises(BadQuantization, match=name):
            method(spec)


def test_a_config_that_the_tensors_belie_is_refused(tmp_path: Path) -> None:
    spec = write(tmp_path, NF4, quantization_config={"quant_method": "gptq"})
    with pytest.raises(BadQuantization, match=rf"says 'gptq', and {AT}\.weight\.absmax \(F32\) is of bnb"):
        base_weights(spec)
    spec = write(tmp_path, AWQ, quantization_config={"quant_method": "gptq"})
    with pytest.raises(BadQuantization, match=rf"{AT}: qweight \[64, 4\], .* do not fit"):
        base_weights(spec)


def test_a_packing_that_nothing_names_is_refused(tmp_path: Path) -> None:
    for leaf, dtype in (("B", "I32"), ("weight", "U8"), ("codes", "I16")):
        spec = write(tmp_path, {f"{AT}.{leaf}": (dtype, (32, 64))})
        with pytest.raises(
            BadQuantization, match=rf"{AT}\.{leaf} is {dtype} \[32, 64\]: a quantization that"
        ):
            base_weights(spec)


def test_a_settings_value_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        BadQuantization, match=r"quantization_config in config\.json is not an object: 'gptq'"
    ):
        base_weights(write(tmp_path, GPTQ, quantization_config="gptq"))


def test_a_weight_that_is_there_quantized_and_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadQuantization, match=rf"has {AT}\.weight twice"):
        base_weights(write(tmp_path, {**GPTQ, **BF16}, quantization_config={"quant_method": "gptq"}))


@pytest.mark.parametrize(
    ("tensors", "settings", "text"),
    [
        (
            GPTQ,
            {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True},
            "gptq, 4 bits, groups of 128, desc_act",
        ),
        (GPTQ, {"quant_method": "gptq", "bits": 3, "group_size": -1}, "gptq, 3 bits, one group"),
        (AWQ, {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, "awq, 4 bits, groups of 64"),
        (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes, 4 bits, nf4"),
        (
            PACKED,
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors, pack-quantized",
        ),
        (FP8, {"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8, blocks of 128x128"),
        (GPTQ, {}, "gptq"),
    ],
)
def test_the_method_is_named_in_a_few_words(
    tmp_path: Path, tensors: Tensors, settings: Mapping[str, Any], text: str
) -> None:
    assert method(write(tmp_path, tensors, quantization_config=settings)) == text


def test_planning_never_imports_torch(tmp_path: Path) -> None:
    for tensors in (GPTQ, AWQ, FP8):
        write(tmp_path, tensors)
        code = (
            "import sys; from exporter.quantization import base_weights as read; "
            "from loader.checkpoint import read_any; "
            f"assert read(read_any({str(tmp_path)!r})); assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
