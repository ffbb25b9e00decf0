"""The page that is made from the settings. That --check finds a change is in test_settings.py."""

import re
from pathlib import Path

import pytest

from service import config_doc
from service.settings import Settings, explain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def rows():
    """Every row of every table, as cells."""
    lines = [line for line in config_doc.page().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_page_in_the_repository_is_the_one_that_would_be_written():
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == config_doc.page()
    assert config_doc.main(["--check"]) == 0


def test_every_setting_has_one_row_of_five_cells_in_the_order_of_the_class(rows):
    assert [row[1] for row in rows] == [
        f"`{name}`" for name in sorted(Settings.model_fields, key=group_order)
    ]
    assert {len(row) for row in rows} == {5}, "a | in a description would make one more cell"


def group_order(name):
    return list(config_doc.GROUPS).index(explain(name)["group"])


def test_a_row_names_the_setting_in_all_three_ways_and_says_what_it_means(rows):
    for flag, key, variable, default, meaning in rows:
        name = key.strip("`")
        spelt = "MODEL" if name == "model" else "--" + name.replace("_", "-")
        assert flag.strip("`").split()[0] == spelt
        assert variable == f"`SNUGFIT_{name.upper()}`"
        assert meaning == Settings.model_fields[name].description
        assert default


def test_defaults_stand_there_as_a_person_writes_them(rows):
    defaults = {row[1].strip("`"): row[3] for row in rows}
    assert defaults["port"] == "`8000`"
    assert defaults["drain_seconds"] == "`30`"
    assert defaults["log_level"] == "`info`"
    assert defaults["budget"] == "-"
    assert defaults["api_key"] == "none"


def test_every_group_has_its_own_section():
    titles = re.findall(r"^## (.+)$", config_doc.page(), re.MULTILINE)
    assert titles == [config_doc.TITLES[group] for group in config_doc.GROUPS]
    assert {explain(name)["group"] for name in Settings.model_fields} == set(config_doc.GROUPS)


def test_what_the_page_links_to_is_there():
    targets = re.findall(r"\]\((?!http)([^)#]+)", config_doc.page())
    assert targets
    for target in targets:
        assert (ROOT / "docs" / target).is_file(), target


def test_the_page_is_the_same_bytes_on_every_system(tmp_path):
    page = tmp_path / "config.md"
    assert config_doc.main(["--page", str(page)]) == 0
    assert page.read_bytes() == config_doc.page().encode("utf-8")
    assert b"\r" not in page.read_bytes()


@pytest.mark.parametrize("content", [None, "", "something else"])
def test_a_check_writes_nothing_and_says_which_command_would(tmp_path, capsys, content):
    page = tmp_path / "config.md"
    if content is not None:
        page.write_text(content, encoding="utf-8")
    assert config_doc.main(["--check", "--page", str(page)]) == 1
    assert (page.read_text(encoding="utf-8") if page.exists() else None) == content
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"{page} is out of date: run python -m service.config_doc\n")
