"""Flags and TOML files become an ExportSpec, or a sentence that says what is wrong."""

from pathlib import Path

import pytest

from exporter.errors import BadSpec
from exporter.spec import DEFAULT_SHARD_BYTES, AdapterRef, ExportSpec, from_toml, make_spec, parse_shard_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("1.88GB", 1_880_000_000), ("1.88", 1_880_000_000), ("5", 5 * 10**9), ("2GiB", 2**31),
        ("1.88MB", 1_880_000),
        ("1880000000.0", 1_880_000_000),
        ("1880000000", 1_880_000_000), (" 0.5 GiB ", 2**29), (".5", 500_000_000),
    ],
)  # fmt: skip
def test_a_shard_size_is_exact_in_every_form(text, n_bytes):
    assert parse_shard_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "0", "0GB", "-1", "1.88Gb", "much", "nan", "1e9", "50%", "1.8.8GB"])
def test_what_is_no_shard_size_is_refused_with_the_forms_that_are(text):
    with pytest.raises(BadSpec, match=r"--shard-size .*Accepted: 1\.88GB"):
        parse_shard_size(text)


@pytest.mark.parametrize("text", ["1000", "5000", "99999", "1880000000.5"])
def test_a_number_that_may_be_bytes_or_gigabytes_is_asked_back(text):
    with pytest.raises(BadSpec, match=r"bytes or gigabytes\? Write"):
        parse_shard_size(text)


@pytest.mark.parametrize(
    ("text", "source", "weight"),
    [
        ("./lora", "./lora", 1), ("./lora:0.5", "./lora", 0.5), ("owner/name@v1:2", "owner/name@v1", 2),
        ("a:-1", "a", -1), ("C:\\lora", "C:\\lora", 1), ("a:1e-1", "a", 0.1), ("a:b", "a:b", 1),
    ],
)  # fmt: skip
def test_a_weight_stands_behind_an_adapters_name(text, source, weight):
    assert AdapterRef.parse(text) == AdapterRef(source, weight)


@pytest.mark.parametrize("text", ["", ":0.5", "a:1e999", "a:0"])
def test_an_adapter_without_a_name_or_with_a_weight_that_is_endless_or_nought_is_refused(text):
    with pytest.raises(BadSpec, match="--adapter"):
        AdapterRef.parse(text)


def test_a_folder_whose_name_ends_like_a_weight_is_a_folder(tmp_path):
    (tmp_path / "run:3").mkdir()
    assert AdapterRef.parse(str(tmp_path / "run:3")) == AdapterRef(str(tmp_path / "run:3"))


def test_an_output_that_is_a_link_is_where_it_leads(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert make_spec({"base": "b", "out": str(tmp_path / "link")}).out == tmp_path / "there"


def test_a_toml_file_says_what_flags_say(tmp_path):
    file = tmp_path / "export.toml"
    file.write_text(
        'base = "b"\nadapters = ["a:0.5", "c"]\nout = "o"\nshard_size = 1.88\noci = "i"\ncheck_logits = true'
    )
    assert make_spec(from_toml(file)) == ExportSpec(
        base="b", out=Path("o").resolve(), adapters=(AdapterRef("a", 0.5), AdapterRef("c")),
        shard_bytes=1_880_000_000, check_logits=True, oci=Path("i").resolve(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('bsae = "b"', "bsae: no such key; did you mean base?"),
        ("base = 1", "base = 1: it is text"),
        ('adapters = "a"', "adapters = 'a': it is a list of texts"),
        ("shard_size = true", "shard_size = True: it is a size"),
        ("overwrite = 1", "overwrite = 1: it is true or false"),
        ("base = ", "is not TOML"),
    ],
)
def test_a_toml_file_with_a_mistake_is_refused_by_key(tmp_path, text, complaint):
    file = tmp_path / "export.toml"
    file.write_text(text)
    with pytest.raises(BadSpec) as refused:
        from_toml(file)
    assert complaint in str(refused.value)


def test_a_toml_file_that_is_not_there_is_refused():
    with pytest.raises(BadSpec, match="cannot be read: No such file"):
        from_toml(Path("nowhere.toml"))


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"out": "o"}, "--base is missing"),
        ({"base": "b"}, "--out is missing"),
        ({"base": "b", "out": "o", "adapters": ["a", "a:0.5"]}, "--adapter a: is there twice"),
        ({"base": "b", "out": "o", "adapters": ["a", "./a/"]}, "--adapter a: is there twice"),
        ({"base": "b", "out": "o", "original_base": "c"}, "--original-base without --adapter"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(values, complaint):
    with pytest.raises(BadSpec, match=complaint):
        make_spec(values)


def test_shards_are_of_five_gb_unless_told_otherwise():
    assert make_spec({"base": "b", "out": "o"}).shard_bytes == DEFAULT_SHARD_BYTES == 5_000_000_000
