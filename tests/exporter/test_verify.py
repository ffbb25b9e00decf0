"""snugfit verify: every way in which an export can be damaged is found and named."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from exporter import manifest
from exporter.errors import VerificationFailed
from exporter.manifest import Manifest
from exporter.verify import verify
from exporter.writer import Written
from loader.errors import NotAModel


@pytest.fixture
def export(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x"}))
    save_file({"w": torch.ones(100)}, folder / "model.safetensors")
    files = [
        Written(path.name, path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.iterdir())
    ]
    (folder / manifest.NAME).write_bytes(Manifest("p", {}, tuple(files), ()).to_json())
    return folder


def problems(folder):
    with pytest.raises(VerificationFailed) as failed:
        verify(folder)
    assert failed.value.exit_code == 45
    return failed.value.problems


def test_a_whole_export_is_verified_file_by_file(export):
    heard = []
    assert verify(export, heard.append).plan_sha256 == "p"
    assert [written.file for written in heard] == ["config.json", "model.safetensors"]


def test_one_flipped_bit_is_found(export):
    file = export / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (problem,) = problems(export)
    assert problem.startswith("model.safetensors: its sha256 is ")


def test_a_file_that_is_short_or_missing_is_found(export):
    os.truncate(export / "model.safetensors", 100)
    (export / "config.json").unlink()
    assert problems(export) == (
        "config.json: is missing",
        "model.safetensors: has 100 bytes, and 472 were written",
    )


def test_a_shard_of_another_export_is_found(export):
    save_file({"v": torch.ones(1)}, export / "model-00001-of-00002.safetensors")
    assert problems(export) == ("model-00001-of-00002.safetensors: is not of this export",)


def test_files_that_a_user_adds_are_no_fault(export):
    (export / "notes.txt").write_text("mine")
    verify(export)


def test_headers_that_are_no_model_are_found_even_when_the_hashes_are_right(export):
    (export / "config.json").write_text("[]")
    content = json.loads((export / manifest.NAME).read_text())
    content["files"]["config.json"] = {"bytes": 2, "sha256": hashlib.sha256(b"[]").hexdigest()}
    (export / manifest.NAME).write_text(json.dumps(content))
    (problem,) = problems(export)
    assert "config.json holds list, not an object" in problem


def test_a_folder_that_is_no_export_is_bad_input_and_not_a_failed_verification(tmp_path):
    with pytest.raises(NotAModel, match=r"there is no snugfit_export\.json"):
        verify(tmp_path)
    with pytest.raises(NotAModel, match="there is no such folder"):
        verify(tmp_path / "nowhere")
