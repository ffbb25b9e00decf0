"""wording.py: names and lists in what an export writes."""

import pytest

from exporter.outputs.wording import hub_id, listed, short_name


def test_a_hub_id_is_told_from_a_path():
    assert hub_id("/models/qwen", None, "Qwen/Qwen2.5-7B@main", "a/b") == "Qwen/Qwen2.5-7B"
    assert hub_id("./qwen", "a/b/c", "qwen", "~/x", "") is None


def test_a_folder_has_one_name_however_its_path_is_typed(tmp_path, monkeypatch):
    (tmp_path / "lab" / "tone" / "x").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    typed = ["lab/tone", "./lab/tone", "lab/tone/", "~/lab/tone", f"{tmp_path}/lab/tone", "lab/tone/x/.."]
    assert {short_name(path) for path in typed} == {"tone"}
    monkeypatch.chdir(tmp_path / "lab" / "tone")
    assert short_name(".") == short_name("../tone") == short_name("x/..") == "tone"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("lab/tone", "lab/tone"),
        ("lab/tone@refs/pr/1", "lab/tone@refs/pr/1"),
        ("/home/me/x/tone/", "tone"),
        ("C:\\models\\tone", "tone"),
        ("~nobody-of-this-name/tone", "tone"),
        ("/x/hub/models--lab--tone/snapshots/0123abcd", "lab/tone"),
        ("/x/hub/models--lab--tone/snapshots/0123abcd/", "lab/tone"),
        ("/x/hub/models--lab--tone/snapshots/0123abcd/inner", "inner"),
        ("/", "/"),
    ],
)
def test_what_is_not_here_is_named_by_its_hub_id_or_its_last_component(source, name):
    assert short_name(source) == name


def test_a_list_is_read_as_a_sentence():
    assert [listed("abc"[:n]) for n in (1, 2, 3)] == ["a", "a and b", "a, b and c"]
