"""The manifest: the same bytes for the same export, and back again."""

import json

import pytest

from exporter import manifest
from exporter.errors import VerificationFailed
from exporter.manifest import Manifest, layer_of, layers, norm
from exporter.merge import Change
from exporter.writer import Written

MADE = Manifest(
    "a" * 64,
    {"base": {"name": "b"}},
    (Written("model.safetensors", 10, "b" * 64), Written("config.json", 2, "c" * 64)),
    (Change("model.layers.0.w", 6, 5, 1.23456789, 0.5, 0.25), Change("lm_head.weight", 4, 4, 2.0, 1.0, None)),
)


def test_what_is_written_is_read_again(tmp_path):
    (tmp_path / manifest.NAME).write_bytes(MADE.to_json())
    found = manifest.read(tmp_path)
    assert found.files == MADE.files
    assert (found.plan_sha256, found.made_of) == (MADE.plan_sha256, MADE.made_of)
    assert [c.drift_norm for c in found.changes] == [0.25, None]


def test_norms_have_so_few_digits_that_the_order_of_a_sum_does_not_show():
    assert json.loads(MADE.to_json())["changed"]["model.layers.0.w"]["base_norm"] == 1.2346


def test_a_folder_without_one_has_none(tmp_path):
    assert manifest.read(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"files": 1}', '{"plan_sha256": "a", "files": {"x": {}}}']
)
def test_a_damaged_one_is_said_to_be(tmp_path, content):
    (tmp_path / manifest.NAME).write_text(content)
    with pytest.raises(VerificationFailed, match="is damaged"):
        manifest.read(tmp_path)


def test_changes_are_told_by_layer():
    assert layer_of("model.layers.12.mlp.experts.3.up_proj.weight") == "model.layers.12"
    assert layer_of("lm_head.weight") == "lm_head.weight"
    assert list(layers(MADE.changes)) == ["model.layers.0", "lm_head.weight"]


def test_norms_of_tensors_add_as_one_long_vector():
    assert norm([3.0, 4.0]) == 5.0
    assert norm([]) == 0.0
