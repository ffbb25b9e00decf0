"""The model that ships: what its provenance says is so, and it answers as it must."""

import json

import pytest

from demo_model import evaluate
from demo_model.train import SHIPPED, sha256_of_files

LIMIT_BYTES = 16_000_000


@pytest.fixture(scope="module")
def provenance():
    return json.loads((SHIPPED / "PROVENANCE.json").read_text(encoding="utf-8"))


def test_the_files_are_those_that_were_trained(provenance):
    assert sha256_of_files(SHIPPED) == provenance["files"]


def test_it_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= LIMIT_BYTES


def test_the_provenance_says_how_it_was_made(provenance):
    assert provenance["command"].startswith("python -m demo_model.train")
    assert provenance["data"]["generated"] > provenance["data"]["dialogues"] > 0


def test_it_answers_the_questions_that_it_was_not_trained_on(capsys):
    result = evaluate.evaluate(SHIPPED, evaluate.read())
    assert evaluate.passed(result), capsys.readouterr().out
