"""exporter/quantization/parts.py, and what all formats share: plans are made without torch."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from exporter.errors import BadQuantization, NeedsDownload
from exporter.quantization.parts import ACTIVATION_SUFFIXES, part, read_now
from exporter.weights import Stored
from loader.files import read_header

PLAN = """
import sys
from pathlib import Path
from exporter.quantization import {module}
from exporter.weights import Stored
from loader.files import read_header
folder = Path({folder!r})
tensors = [Stored(info, folder) for info in read_header(folder / "model.safetensors")]
found = {module}.weights("base", {settings!r}, tensors)
print([(weight.name, weight.shape) for weight in found], "torch" in sys.modules)
"""
INT4 = {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8}}


def stored(folder, **tensors):
    save_file(tensors, folder / "model.safetensors")
    return {info.name: Stored(info, folder) for info in read_header(folder / "model.safetensors")}


@pytest.mark.parametrize(
    ("module", "settings", "tensors"),
    [
        ("bnb", {}, {"a.weight": torch.zeros(8, 16, dtype=torch.int8), "a.SCB": torch.ones(8)}),
        (
            "fp8",
            {},
            {"a.weight": torch.zeros(8, 16).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)},
        ),
        (
            "compressed",
            {"format": "pack-quantized", "config_groups": {"a": INT4}},
            {
                "a.weight_packed": torch.zeros(8, 2, dtype=torch.int32),
                "a.weight_scale": torch.ones(8, 2),
                "a.weight_shape": torch.tensor([8, 16]),
            },
        ),
    ],
)
def test_a_plan_is_made_without_importing_torch(tmp_path, module, settings, tensors):
    stored(tmp_path, **tensors)
    code = PLAN.format(module=module, folder=str(tmp_path), settings=settings)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[('a.weight', (8, 16))] False"


def test_a_few_bytes_are_read_where_the_header_says(tmp_path):
    parts = stored(tmp_path, a=torch.arange(5, dtype=torch.uint8), b=torch.tensor([3, 258]))
    assert read_now("base", parts["a"], 5) == bytes([0, 1, 2, 3, 4])
    assert read_now("base", parts["b"], 16) == (3).to_bytes(8, "little") + (258).to_bytes(8, "little")


def test_more_than_a_few_bytes_are_refused(tmp_path):
    parts = stored(tmp_path, a=torch.zeros(5, dtype=torch.uint8))
    with pytest.raises(BadQuantization, match=r"base: a has 5 bytes, where at most 4"):
        read_now("base", parts["a"], 4)


def test_nothing_is_read_from_the_hub(tmp_path):
    remote = replace(stored(tmp_path, a=torch.zeros(1))["a"], folder=None)
    with pytest.raises(NeedsDownload, match=r"\(a\).* Download the model first"):
        read_now("base", remote, 4)


def test_a_part_that_is_missing_is_named_with_its_weight(tmp_path):
    parts = stored(tmp_path, a=torch.zeros(1))
    assert part("base", parts, "a", "x") is parts["a"]
    with pytest.raises(BadQuantization, match=r"base: x is quantized, and there is no b"):
        part("base", parts, "b", "x")


def test_no_weight_has_a_name_of_what_calibration_leaves_behind():
    names = [
        "a.weight",
        "a.bias",
        "a.weight_scale",
        "mlp.gate.e_score_correction_bias",
        "norm.scale",
        "q_scale",
    ]
    assert not [name for name in names if name.endswith(ACTIVATION_SUFFIXES)]
    assert "s.k_scale".endswith(ACTIVATION_SUFFIXES)
