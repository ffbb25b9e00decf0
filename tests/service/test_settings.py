import os
import re
import tomllib
from pathlib import Path

import pytest
from pydantic import ValidationError

from loader.usage import Parser, UsageError
from service import config_doc, plan_command, serve_command
from service.flags import add_flags, typed_flags
from service.settings import Settings
from service.sources import load_settings

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.upper().startswith("SNUGFIT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def toml(tmp_path):
    def write(text, encoding="utf-8"):
        path = tmp_path / "snugfit.toml"
        path.write_text(text, encoding=encoding)
        return path

    return write


def test_the_variables_of_other_tools_are_theirs(monkeypatch):
    for name in ("OTEL_SERVICE_NAME", "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_TRACES_EXPORTER"):
        monkeypatch.setenv(name, "http://collector:4318")
    monkeypatch.setenv("SNUGFIT_TRACES", "on")
    assert load_settings({}).traces == "on"
    assert os.environ["OTEL_SERVICE_NAME"] == "http://collector:4318"


def refusal(flags=None, config=None):
    with pytest.raises(UsageError) as refused:
        load_settings(flags or {}, config)
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_exemplars_without_traces_are_refused(monkeypatch, toml):
    accepted = "accepted: off, or on where traces are on"
    assert refusal({"exemplars": "on"}) == (
        f"--exemplars: 'on' names traces, and traces are off: turn them on too; {accepted}"
    )
    config = toml('exemplars = "on"')
    for run in (serve_command.run, plan_command.run):
        with pytest.raises(UsageError, match="exemplars: 'on' names traces"):
            run(["--config", str(config)])
    monkeypatch.setenv("SNUGFIT_TRACES", "on")
    assert load_settings({}, config).exemplars == "on"


def test_exemplars_are_not_blamed_for_what_is_wrong_with_traces():
    assert (
        refusal({"exemplars": "on", "traces": "yes"})
        == "--traces: 'yes' is not accepted; accepted: on or off"
    )


def test_flags_win_over_the_environment_and_that_over_the_file(monkeypatch, toml):
    config = toml('host = "from-file"\nport = 1\nmax_queue = 1')
    monkeypatch.setenv("SNUGFIT_PORT", "2")
    monkeypatch.setenv("SNUGFIT_MAX_QUEUE", "2")
    settings = load_settings({"max_queue": "3"}, config)
    assert (settings.host, settings.port, settings.max_queue) == ("from-file", 2, 3)
    assert settings.drain_seconds == Settings().drain_seconds


def test_the_file_can_be_named_in_the_environment_and_the_flag_wins(monkeypatch, toml, tmp_path):
    monkeypatch.setenv("SNUGFIT_CONFIG", str(toml("port = 7")))
    assert load_settings({}).port == 7
    other = tmp_path / "other.toml"
    other.write_text("port = 8")
    assert load_settings({}, other).port == 8


def test_settings_alone_read_no_environment_and_are_frozen(monkeypatch):
    monkeypatch.setenv("SNUGFIT_PORT", "2")
    settings = Settings()
    assert settings.port == 8000
    with pytest.raises(ValidationError):
        settings.port = 3


def test_a_misspelt_variable_stops_the_start_with_the_right_name(monkeypatch):
    monkeypatch.setenv("SNUGFIT_BUGDET", "16GB")
    assert "SNUGFIT_BUGDET: no such setting; did you mean SNUGFIT_BUDGET?" in refusal()


def test_the_value_of_an_unknown_variable_is_not_shown(monkeypatch):
    monkeypatch.setenv("SNUGFIT_API_KEYS", "sk-secret")
    assert "sk-secret" not in refusal()


def test_an_unknown_key_of_the_file_is_named_with_the_nearest(toml):
    config = toml("max-queue = 3")
    assert refusal(config=config) == f"{config}: max-queue: no such setting; did you mean max_queue?"


def test_every_unknown_key_is_told_at_once(toml):
    with pytest.raises(UsageError) as refused:
        load_settings({}, toml("prot = 3\n[server]\nhost = 'x'"))
    assert len(refused.value.problems) == 2


def test_an_empty_variable_counts_as_not_set(monkeypatch, toml):
    monkeypatch.setenv("SNUGFIT_BUDGET", "")
    assert load_settings({}, toml('budget = "8GB"')).budget == "8GB"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", "eighty"),
        ("port", "65536"),
        ("port", "-1"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("dtype", "int4"),
        ("context", "0"),
        ("concurrency", "0.5"),
        ("max_queue", "-1"),
        ("max_wait_seconds", "-1"),
        ("max_wait_seconds", "inf"),
        ("drain_seconds", "nan"),
        ("keep_alive_seconds", "inf"),
        ("log_level", "loud"),
        ("host", ""),
        ("model", " "),
        ("max_body_bytes", "12"),
        ("chat_template", "no/such/file.jinja"),
        ("api_key_file", "no/such/file"),
    ],
)
def test_a_bad_value_is_told_with_its_flag_the_value_and_what_is_accepted(field, value):
    words = refusal({field: value})
    flag = "MODEL" if field == "model" else "--" + field.replace("_", "-")
    assert words.startswith(f"{flag}: {value!r} ")
    assert "; accepted: " in words


def test_a_bad_value_says_which_variable_or_which_key_of_which_file_it_is_from(monkeypatch, toml):
    config = toml("port = 99999")
    assert refusal(config=config).startswith(f"{config}: port: 99999 is not accepted")
    monkeypatch.setenv("SNUGFIT_PORT", "x")
    assert refusal(config=config).startswith("SNUGFIT_PORT: 'x' is not accepted")


def test_true_is_no_port(toml):
    assert "port: True is not accepted" in refusal(config=toml("port = true"))


def test_every_bad_value_is_told_at_once():
    with pytest.raises(UsageError) as refused:
        load_settings({"port": "x", "dtype": "int4"})
    assert len(refused.value.problems) == 2


@pytest.mark.parametrize("text", ['api_key = ["sk-secret", ""]', "api_key = [[1], 'sk-secret']"])
def test_a_refused_api_key_is_never_shown(toml, text):
    words = refusal(config=toml(text))
    assert "api_key" in words
    assert "sk-secret" not in words


def test_api_keys_are_hidden_in_a_printed_settings():
    assert "sk-secret" not in repr(load_settings({"api_key": "sk-secret"}))


def test_an_empty_api_key_is_refused_because_it_would_let_everyone_in():
    assert "an empty key would let everyone in" in refusal({"api_key": ""})
    assert "an empty key" in refusal({"api_key": "one,"})


def test_api_keys_come_from_lists_and_from_a_file_with_one_per_line(monkeypatch, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("three\n\n  four \n")
    monkeypatch.setenv("SNUGFIT_API_KEY", "one, two")
    assert load_settings({"api_key_file": str(keys)}).api_keys == ("one", "two", "three", "four")


def test_a_key_file_without_a_key_is_refused(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("\n \n")
    assert "holds no key" in refusal({"api_key_file": str(keys)})


def test_a_chat_template_that_is_not_utf_8_is_refused(tmp_path):
    template = tmp_path / "t.jinja"
    template.write_bytes("{{ 'ü' }}".encode("latin-1"))
    assert "--chat-template" in refusal({"chat_template": str(template)})


def test_sizes_are_text_or_bytes(toml):
    config = toml('max_body_bytes = "1MiB"\nbudget = 16_000_000_000')
    settings = load_settings({}, config)
    assert (settings.max_body_bytes, settings.budget) == (2**20, "16000000000")


def test_limits_may_be_a_table_in_toml(toml):
    settings = load_settings({}, toml('max_memory = { 0 = "15GiB", cpu = "30GiB" }'))
    assert settings.max_memory == "0=15GiB,cpu=30GiB"


def test_a_budget_on_the_command_line_hides_the_limits_of_the_environment(monkeypatch):
    monkeypatch.setenv("SNUGFIT_MAX_MEMORY", "cpu=3GB")
    settings = load_settings({"budget": "2GB"})
    assert (settings.budget, settings.max_memory) == ("2GB", None)


def test_budget_and_limits_from_one_place_contradict_each_other(monkeypatch):
    assert "--budget and --max-memory" in refusal({"budget": "2GB", "max_memory": "cpu=3GB"})
    monkeypatch.setenv("SNUGFIT_MAX_MEMORY", "cpu=3GB")
    monkeypatch.setenv("SNUGFIT_BUDGET", "3GB")
    assert "SNUGFIT_BUDGET and SNUGFIT_MAX_MEMORY" in refusal()


@pytest.mark.parametrize(
    ("name", "value"), [("SNUGFIT_PORT", "tcp://10.0.0.1:8000"), ("SNUGFIT_SERVICE_HOST", "10.0.0.1")]
)
def test_a_kubernetes_service_link_is_recognised(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert "enableServiceLinks: false" in refusal()


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"port 8", "not TOML"), (b"host = '\xff'", "not UTF-8"), (None, "no such file")],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, content, words):
    config = tmp_path / "bad.toml"
    if content is not None:
        config.write_bytes(content)
    assert refusal(config=config).startswith(f"{config}: {words}")


def test_a_byte_order_mark_as_windows_editors_write_it_is_no_error(toml):
    assert load_settings({}, toml("port = 9", encoding="utf-8-sig")).port == 9


def test_a_repeated_flag_is_a_list():
    parser = Parser(prog="t")
    add_flags(parser)
    parsed = parser.parse(["--api-key", "a", "--api-key=b,c", "some/model"])
    settings = load_settings(typed_flags(parsed))
    assert (settings.model, settings.api_keys) == ("some/model", ("a", "b", "c"))


def test_an_abbreviated_flag_is_not_guessed():
    parser = Parser(prog="t")
    add_flags(parser)
    with pytest.raises(UsageError, match="--budg: not understood; did you mean --budget"):
        parser.parse(["--budg", "3GB"])


def test_every_field_is_described_and_documented():
    page = config_doc.page()
    for name, field in Settings.model_fields.items():
        assert field.description, name
        assert f"`SNUGFIT_{name.upper()}`" in page


def test_the_page_is_checked_against_what_it_would_be(tmp_path):
    page = tmp_path / "config.md"
    assert config_doc.main(["--page", str(page)]) == 0
    assert config_doc.main(["--check", "--page", str(page)]) == 0
    page.write_text(page.read_text(encoding="utf-8") + "\nby hand", encoding="utf-8")
    assert config_doc.main(["--check", "--page", str(page)]) == 1


def test_the_example_is_accepted_and_so_is_every_line_that_is_commented_out(toml):
    example = (ROOT / "examples" / "snugfit.toml").read_text(encoding="utf-8")
    load_settings({}, toml(example))
    options = [line for line in example.splitlines() if re.match(r"# \w+ = ", line)]
    assert len(options) > 5
    every = {}  # one needs another that stands before it
    for line in options:
        key, value = next(iter(tomllib.loads(line[2:]).items()))
        if key not in ("api_key_file", "max_memory"):
            every[key] = value
            load_settings(every)
