"""helm/README.md and the schema's keys are made from what they repeat."""

import copy
import json

import pytest

from deployment import chart_readme
from deployment.chart_readme import completed, readme, walk
from exporter.spec import KEYS
from service.settings import Settings

VALUES = """\
# How many. Of everything.
count: 1

part:
  # A way | another.
  way: a
  # Filled by users.
  labels: {x: "1"}
"""
SCHEMA = {
    "additionalProperties": False,
    "definitions": {"map": {"type": "object"}},
    "properties": {
        "count": {"type": "integer"},
        "part": {
            "type": "object",
            "additionalProperties": False,
            "properties": {"way": {"enum": ["a", "b"]}, "labels": {"$ref": "#/definitions/map"}},
        },
    },
}


def test_what_was_made_is_what_is_there():
    assert chart_readme.main(["--check"]) == 0


def test_a_page_that_is_out_of_date_is_named(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text("old")
    monkeypatch.setattr(chart_readme, "made", lambda: {page: "new"})
    assert chart_readme.main(["--check"]) == 1
    assert str(page) in capsys.readouterr().err
    assert chart_readme.main([]) == 0
    assert page.read_text() == "new"


def test_each_value_has_a_row_with_its_type_default_and_comment():
    page = readme(VALUES, SCHEMA)
    assert "| `count` | integer | `1` | How many. Of everything. |" in page
    assert '| `part.way` | `a`, `b` | `"a"` | A way \\| another. |' in page
    assert '| `part.labels` | map | `{"x": "1"}` | Filled by users. |' in page


def test_what_users_fill_is_one_value():
    assert [value.path for value in walk(VALUES, SCHEMA)] == [
        ("count",), ("part",), ("part", "way"), ("part", "labels"),
    ]  # fmt: skip


@pytest.fixture
def properties():
    parts = {"config": {"properties": {}}, "exporter": {"properties": {"spec": {"properties": {"old": {}}}}}}
    found = completed(copy.deepcopy({"properties": parts}))["properties"]
    return found["config"]["properties"], found["exporter"]["properties"]["spec"]["properties"]


def test_the_schema_has_the_keys_of_both_programs(properties):
    config, spec = properties
    assert config.keys() == Settings.model_fields.keys()
    assert spec.keys() == KEYS.keys()


def test_words_of_a_setting_are_known_and_on_and_off_may_be_yamls_truths(properties):
    config, _ = properties
    assert config["log_format"]["enum"] == ["text", "json"]
    assert config["prefix_reuse"]["enum"] == ["on", "off", True, False]
    assert "boolean" not in json.dumps(config["budget"]["type"])
