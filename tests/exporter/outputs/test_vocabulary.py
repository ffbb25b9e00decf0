"""exporter/outputs/vocabulary.py, against the tokenizers that the libraries build from the same files."""

import base64
import json
import re
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from transformers import PreTrainedTokenizerFast

from exporter.outputs.vocabulary import ends_text, tokenizer_rows

DEMO = Path(__file__).parents[3] / "service" / "demo"
# Tokens that look like JSON, or like the keys that are searched for.
NASTY = [
    '"',
    "\\",
    '\\"',
    '"vocab": {',
    "vocab",
    "added_tokens",
    "model",
    '":9999,',
    "}",
    "{",
    "]",
    "名",
    "\n",
]
MODELS = {
    "BPE": BPE(vocab={token: n for n, token in enumerate(NASTY)}, merges=[]),
    "WordLevel": WordLevel(vocab={token: n for n, token in enumerate(NASTY)}, unk_token="vocab"),
    "WordPiece": WordPiece(vocab={token: n for n, token in enumerate(NASTY)}, unk_token="vocab"),
    "Unigram": Unigram([(token, -0.5 * n) for n, token in enumerate(NASTY)], unk_id=0),
}


def highest_id(tokenizer):
    return max(tokenizer.get_vocab(with_added_tokens=True).values())


@pytest.fixture(params=[True, False], ids=["indented", "in one line"])
def saved(request, tmp_path):
    def save(tokenizer):
        tokenizer.save(str(tmp_path / "tokenizer.json"), pretty=request.param)
        return tmp_path

    return save


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_every_kind_of_tokenizer_json_is_counted(model, saved):
    tokenizer = Tokenizer(model)
    assert tokenizer_rows(saved(tokenizer)) == 1 + highest_id(tokenizer) == len(NASTY)
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens(['a "new": 1 one'])
    assert tokenizer_rows(saved(tokenizer)) == 1 + highest_id(tokenizer) == len(NASTY) + 2


def test_the_demo_models_tokenizer_is_counted():
    assert tokenizer_rows(DEMO) == 1 + highest_id(Tokenizer.from_file(str(DEMO / "tokenizer.json")))


def test_ids_with_gaps_count_to_the_highest(tmp_path):
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0, "b": 41, "c": 7}))
    assert tokenizer_rows(tmp_path) == 42
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<x>": 99}))
    assert tokenizer_rows(tmp_path) == 100


def test_tokens_that_only_the_config_adds_are_counted(saved):
    folder = saved(Tokenizer(MODELS["BPE"]))
    config = {"added_tokens_decoder": {"500": {"content": "<x>"}, "note": {}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_rows(folder) == 501


def test_an_old_list_beside_a_tokenizer_json_does_not_count(saved):
    folder = saved(Tokenizer(MODELS["BPE"]))
    (folder / "added_tokens.json").write_text(json.dumps({"<gone>": 5000}))
    assert tokenizer_rows(folder) == len(NASTY)


def varint(number):
    head = [0x80 | (number >> shift) & 0x7F for shift in range(0, number.bit_length() - 7, 7)]
    return bytes([*head, number >> 7 * len(head)])


def test_a_sentencepiece_model_is_counted(tmp_path):
    piece = b"\x0a\x03abc\x15\x00\x00\x00\x00\x18\x01"  # text, score (fixed32), type (varint)
    long = b"\x0a" + varint(300) + b"x" * 300
    pieces = b"".join(b"\x0a" + varint(len(p)) + p for p in [piece] * 5 + [long])
    trainer = b"\x12" + varint(4) + b"\x0a\x02zz"
    (tmp_path / "tokenizer.model").write_bytes(pieces + trainer)
    assert tokenizer_rows(tmp_path) == 6


def test_a_tiktoken_file_is_counted(tmp_path):
    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    (tmp_path / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    assert tokenizer_rows(tmp_path) == 256


def test_a_tekken_file_is_counted(tmp_path):
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {"default_vocab_size": 131072}, "vocab": []}))
    assert tokenizer_rows(tmp_path) == 131072


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": "b"}}}'),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 1'),
        ("vocab.json", b""),
        ("tokenizer.model", b"\x0a\xff"),
        ("tokenizer.model", b"\x0a\x7fabc"),
        ("qwen.tiktoken", b"x"),
        ("tekken.json", b"[]"),
    ],
)
def test_what_cannot_be_read_gives_no_number(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert tokenizer_rows(tmp_path) is None


def test_no_tokenizer_has_no_rows(tmp_path):
    assert tokenizer_rows(tmp_path) is None
    assert ends_text(tmp_path) is None


def test_merges_are_not_parsed(saved):
    folder = saved(Tokenizer(BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")])))
    path = folder / "tokenizer.json"
    path.write_text(re.sub(r'"merges":.*', '"merges": [cut off', path.read_text(), flags=re.DOTALL))
    assert tokenizer_rows(folder) == 3


def test_the_token_that_ends_a_text_is_what_transformers_says(tmp_path):
    tokenizer = Tokenizer(MODELS["BPE"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="名")
    fast.save_pretrained(tmp_path)
    assert ends_text(tmp_path) == fast.eos_token_id == len(NASTY)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='\\"')
    fast.save_pretrained(tmp_path)
    assert ends_text(tmp_path) == fast.eos_token_id == 2
    assert ends_text(DEMO) == PreTrainedTokenizerFast.from_pretrained(DEMO).eos_token_id


def test_the_end_is_found_in_the_files_of_older_transformers(tmp_path):
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    (tmp_path / "vocab.json").write_text(json.dumps({"<s>": 1, "</s>": 2}))
    assert ends_text(tmp_path) == 2
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<e>", "added_tokens_decoder": {"77": {"content": "<e>"}}})
    )
    assert ends_text(tmp_path) == 77
