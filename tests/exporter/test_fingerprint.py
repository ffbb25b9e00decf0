"""What makes two exports the same."""

import hashlib
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import save_file

from exporter.fingerprint import SAMPLE_BYTES, base_sha256, file_sha256, problem, sha256_of
from exporter.writer import Written
from loader import checkpoint


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "layers": 2}))
    save_file({"a": torch.arange(5000.0), "b": torch.ones(3)}, folder / "model.safetensors")
    return folder


def sha256(folder):
    return base_sha256(checkpoint.read_any(folder))


def test_a_copy_elsewhere_is_the_same_base(model, tmp_path):
    shutil.copytree(model, tmp_path / "copy")
    assert sha256(model) == sha256(tmp_path / "copy")


def test_other_weights_of_the_same_shapes_are_another_base(model):
    before = sha256(model)
    save_file({"a": torch.arange(5000.0), "b": torch.zeros(3)}, model / "model.safetensors")
    assert sha256(model) != before


def test_another_config_is_another_base(model):
    before = sha256(model)
    (model / "config.json").write_text(json.dumps({"model_type": "x", "layers": 3}))
    assert sha256(model) != before


def test_only_the_beginning_of_a_tensor_is_read(model):
    before = sha256(model)
    file = model / "model.safetensors"
    info = next(t for t in checkpoint.read_any(model).tensors if t.name == "a")
    with file.open("r+b") as stream:
        stream.seek(info.start + SAMPLE_BYTES)
        stream.write(os.urandom(4))
    assert sha256(model) == before


def test_the_order_of_keys_does_not_matter():
    assert sha256_of({"a": 1, "b": 2}) == sha256_of({"b": 2, "a": 1}) != sha256_of({"a": 2, "b": 1})


def test_an_adapters_file_is_hashed_whole(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf")


def test_a_file_is_as_it_was_written_when_size_and_hash_are(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    right = hashlib.sha256(b"abc").hexdigest()
    assert problem(tmp_path, Written("a", 3, right)) == ""
    assert problem(tmp_path, Written("a", 4, right)) == "a: has 3 bytes, and 4 were written"
    assert problem(tmp_path, Written("a", 3, "0" * 64)).startswith("a: its sha256 is ba7816bf")
    assert problem(tmp_path, Written("b", 3, right)) == "b: is missing"
