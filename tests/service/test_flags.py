"""Flags are made from the settings; what those make of the values is in test_settings.py."""

from pathlib import Path

import pytest

from loader.usage import Parser, UsageError
from service.flags import GROUPS, LIST_FIELDS, add_flags, default_text, help_text, typed_flags
from service.settings import Settings, explain
from service.sources import flag_name


@pytest.fixture
def parser():
    made = Parser(prog="t")
    add_flags(made)
    return made


def typed(parser, *argv):
    return typed_flags(parser.parse(argv))


def test_what_was_not_typed_is_not_there_so_that_weaker_sources_count(parser):
    assert typed(parser) == {}
    assert typed(parser, "--port", "8000") == {"port": "8000"}, "also where it is the default"


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_setting_is_a_flag_and_its_value_stays_text(parser, field):
    argv = ["1"] if field == "model" else [flag_name(field), "1"]
    assert typed(parser, *argv) == {field: "1"}
    if field != "model":
        assert typed(parser, f"{flag_name(field)}=1") == {field: "1"}


def test_only_a_list_may_be_repeated_of_the_others_the_last_counts(parser):
    for field in set(Settings.model_fields) - {"model"}:
        flag = flag_name(field)
        assert typed(parser, flag, "a", flag, "b") == {field: "a,b" if field in LIST_FIELDS else "b"}


def test_the_lists_are_those_of_the_settings():
    assert {name for name, field in Settings.model_fields.items() if field.default == ()} == LIST_FIELDS


def test_the_file_and_a_commands_own_flags_are_no_settings(parser):
    parser.add_argument("--json", action="store_true")
    parsed = parser.parse(["--config", "a.toml", "--json", "--budget", "1GB", "some/model"])
    assert parsed.config == Path("a.toml")
    assert typed_flags(parsed) == {"budget": "1GB", "model": "some/model"}


def test_the_model_may_stand_anywhere_and_only_once(parser):
    for argv in (["m", "--port", "1"], ["--port", "1", "m"]):
        assert typed(parser, *argv) == {"model": "m", "port": "1"}
    with pytest.raises(UsageError, match="n: not understood"):
        typed(parser, "m", "n")


def test_every_setting_is_in_one_of_the_groups():
    assert {explain(name)["group"] for name in Settings.model_fields} == set(GROUPS)


def test_a_command_has_the_flags_of_its_groups_and_refuses_the_others():
    parser = Parser(prog="t")
    add_flags(parser, ("model", "memory"))
    assert typed(parser, "m", "--budget", "1GB") == {"model": "m", "budget": "1GB"}
    with pytest.raises(UsageError, match="--port: not understood"):
        typed(parser, "--port", "1")


def test_help_says_of_every_flag_what_it_means_and_its_default(parser):
    shown = "".join(parser.format_help().split())
    for name in Settings.model_fields:
        assert flag_name(name) in shown
        assert "".join(help_text(name).split()) in shown, name


@pytest.mark.parametrize(
    ("field", "text"),
    [("port", "8000"), ("drain_seconds", "30"), ("keep_alive_seconds", "10"), ("device", "auto"),
     ("budget", ""), ("api_key", ""), ("max_body_bytes", "1000000")],
)  # fmt: skip
def test_a_default_is_written_as_a_person_would_and_accepted_as_a_value(field, text):
    assert default_text(field) == text
    if text:
        assert getattr(Settings(**{field: text}), field) == getattr(Settings(), field)


def test_a_flag_without_its_value_is_refused(parser):
    with pytest.raises(UsageError, match="--port"):
        typed(parser, "--port")
