"""The command that is offered when a model does not fit is typed in, and must work."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.make_model import make
from loader.budget import parse_bytes
from loader.errors import BudgetExceeded
from service import cli, misfit, serve_command
from service.flags import typed_flags
from service.misfit import retry_command, size_text
from service.planning import make_plan_for
from service.sources import load_settings

MISFIT = BudgetExceeded("cpu", 80_000_000, 1_000_000, 64_000_001, "hint")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """Nothing of this machine's environment, no change of the process's loggers, and a shell's quoting."""
    for name in [name for name in os.environ if name.upper().startswith("SNUGFIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("service.logs.to_stderr", lambda *_: None)
    monkeypatch.setattr(misfit.sys, "platform", "linux")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(make("tiny", tmp_path_factory.mktemp("models") / "tiny model's", headers_only=True))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return str(make("7b", tmp_path_factory.mktemp("models") / "large", headers_only=True))


def refused(capsys, *argv):
    """The words of the command that is offered instead of `snugfit` with these."""
    assert cli.main(argv) == 43
    lines = [line.strip() for line in "".join(capsys.readouterr()).splitlines()]
    (offer,) = (line for line in lines if line.startswith(f"snugfit {argv[0]} "))
    return shlex.split(offer)[1:]


def planned(capsys, argv):
    """What the command plans, which must succeed."""
    assert cli.main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "flags",
    [
        ["--device", "cpu", "--budget", "1MB"],
        ["--device=cpu", "--budget=1MB"],
        ["--max-memory", "cpu=1MB"],
        ["--max-memory=cpu=1MB,disk=0"],
        ["--gpu", "300MiB"],
        ["--gpu=300MiB", "--device=cuda"],
        ["--gpu", "300MiB", "--device", "auto"],
        ["--device", "cuda:3", "--budget", "1MB"],
        ["--max-memory", "0=1MB,cpu=1GB"],
        ["--max-memory", "0=1MB,cpu=0,disk=0"],
        ["--max-memory", "0=1MB,1=1MB,cpu=1GB"],
        ["--device", "cpu", "--budget", "1MB", "--context", "9000", "--concurrency", "7"],
        ["--device", "cpu", "--budget", "1MB", "--dtype", "float32", "--log-level", "error"],
    ],
    ids=" ".join,
)
def test_the_command_that_is_offered_plans_and_keeps_everything_else(model, capsys, flags):
    offered = refused(capsys, "plan", model, *flags)
    plan = planned(capsys, offered)
    assert plan["model"] == model
    for flag, key in (("--context", "context"), ("--concurrency", "concurrency"), ("--dtype", "dtype")):
        if flag in flags:
            assert str(plan[key]) == flags[flags.index(flag) + 1]


def test_the_device_stays_the_one_that_did_not_fit(model, capsys):
    for flags, device in (
        (["--gpu", "300MiB"], "cuda:0"),
        (["--gpu", "300MiB", "--device", "auto"], "cuda:0"),
        (["--device", "cuda:3", "--budget", "1MB"], "cuda:3"),
        (["--max-memory", "cpu=1MB"], "cpu"),
    ):
        plan = planned(capsys, refused(capsys, "plan", model, *flags))
        assert plan["devices"][0]["device"] == device, flags


def test_the_offered_size_is_the_smallest_that_works_but_for_rounding(model, capsys):
    *words, budget, size = refused(capsys, "plan", model, "--device", "cpu", "--budget", "1MB")
    assert budget == "--budget"
    planned(capsys, [*words, budget, size])
    assert cli.main([*words, budget, str(parse_bytes(size) * 99 // 100)]) == 43


def test_a_large_model_is_offered_a_budget_with_which_it_is_offloaded(large, capsys):
    plan = planned(capsys, refused(capsys, "plan", large, "--gpu", "1GiB"))
    assert plan["offloaded_bytes"] > 0


def test_a_budget_from_the_environment_or_the_file_gives_way_to_the_offered_one(
    model, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("SNUGFIT_MAX_MEMORY", "cpu=1MB")
    planned(capsys, refused(capsys, "plan", model))
    monkeypatch.delenv("SNUGFIT_MAX_MEMORY")
    config = tmp_path / "snugfit.toml"
    config.write_text(f'model = {json.dumps(model)}\nbudget = "1MB"\ndevice = "cpu"\ncontext = 777')
    plan = planned(capsys, refused(capsys, "plan", "--config", str(config)))
    assert (plan["model"], plan["context"]) == (model, 777)


def test_what_serve_offers_is_a_serve_command_with_its_own_flags_that_plans(model, capsys):
    argv = ["serve", model, "--port", "0", "--device", "cpu", "--budget", "1MB", "--served-model-name", "a b"]
    command, *offered = refused(capsys, *argv)
    assert command == "serve"
    settings = load_settings(typed_flags(serve_command._parser().parse(offered)))
    assert (settings.model, settings.port, settings.served_model_name) == (model, 0, "a b")
    assert make_plan_for(settings).main_device == "cpu"


def test_the_words_that_were_typed_stay_as_they_are_and_where_they_are():
    argv = ["--context", "5", "a model", "--budget", "1MB", "--device", "auto", "--concurrency=2"]
    argv += ["--max-memory=cpu=1MB", "--device=cpu", "--gpu=1GB"]
    assert retry_command("plan", argv, MISFIT) == (
        "snugfit plan --context 5 'a model' --concurrency=2 --device cpu --budget 64.1MB"
    )


def test_a_memory_flag_that_lacks_its_value_is_left_out_as_well():
    assert retry_command("plan", ["m", "--budget"], MISFIT) == "snugfit plan m --device cpu --budget 64.1MB"


def test_on_windows_words_are_quoted_as_windows_does(monkeypatch):
    monkeypatch.setattr(misfit.sys, "platform", "win32")
    command = retry_command("plan", [r"C:\my models\tiny", "--budget", "1MB"], MISFIT)
    assert command == r'snugfit plan "C:\my models\tiny" --device cpu --budget 64.1MB'


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("name", ["my model", "it's", "$HOME", "a;b", "*", "模型", "-"])
def test_a_shell_reads_back_what_was_typed(name):
    command = retry_command("plan", [name], MISFIT)
    shown = subprocess.run(["sh", "-c", f"printf '%s\\n' {command}"], capture_output=True, check=True)
    assert shown.stdout.decode().splitlines() == [
        "snugfit", "plan", name, "--device", "cpu", "--budget", "64.1MB",
    ]  # fmt: skip


@given(st.integers(1000, 10**14))
def test_a_size_is_never_less_than_what_is_needed_and_at_most_a_hundredth_more(n_bytes):
    given_bytes = parse_bytes(size_text(n_bytes))
    assert n_bytes <= given_bytes <= n_bytes * 1.01 + 1
