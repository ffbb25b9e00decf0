"""How far the original is from what the adapter was trained on."""

import json

import pytest

from exporter import drift
from exporter.drift import by_layer, report, warning
from exporter.merge import Change


def change(name, update, drifted):
    return Change(name, 10, 5, 1.0, update, drifted)


CHANGES = [
    change("model.layers.0.q.weight", 3.0, 0.3), change("model.layers.0.k.weight", 4.0, 0.4),
    change("model.layers.1.q.weight", 0.1, 2.0), change("lm_head.weight", 1.0, None),
]  # fmt: skip


def test_a_layers_norms_are_those_of_its_tensors_together():
    first, second = by_layer(CHANGES)
    assert (first.layer, first.update_norm) == ("model.layers.0", 5.0)
    assert first.ratio == pytest.approx(0.1)
    assert second.ratio == pytest.approx(20)


def test_the_report_is_a_file_with_a_ratio_per_layer():
    layers = json.loads(report(by_layer(CHANGES))[drift.NAME])["layers"]
    assert layers["model.layers.1"] == {"drift_norm": 2.0, "update_norm": 0.1, "ratio": 20.0}


def test_without_an_original_base_there_is_no_report():
    assert report(by_layer([CHANGES[3]])) == {}
    assert warning(by_layer([CHANGES[3]])) is None


def test_a_layer_that_an_adapter_leaves_as_it_is_has_no_ratio():
    layers = json.loads(report(by_layer([change("a.0.w", 0.0, 1.0)]))[drift.NAME])["layers"]
    assert layers["a.0"]["ratio"] is None


def test_a_large_ratio_is_warned_of_with_its_layer_and_number():
    assert warning(by_layer(CHANGES)).startswith("model.layers.1: the original differs")
    assert "by 20.0 times" in warning(by_layer(CHANGES))
    assert warning(by_layer(CHANGES[:2])) is None
