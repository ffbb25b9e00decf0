"""The commands as a user or a Job calls them: what is printed, exit codes, the termination log."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.make_adapter import make as make_adapter
from exporter import __main__ as program
from exporter import export as exporting
from exporter.staging import staging_folder

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "service" / "demo"
# Runs `python -m exporter`, then tells on stderr which heavy packages it has imported.
SPY = """
import sys
from exporter.__main__ import main
code = main(sys.argv[1:])
print("imported:", *[n for n in ("torch", "transformers", "accelerate") if n in sys.modules], file=sys.stderr)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return make_adapter(DEMO, tmp_path_factory.mktemp("adapters") / "lora", rank=4)


@pytest.fixture
def run(capsys):
    """A function: words -> (exit code, stdout, stderr) of the command in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def call(*words):
        code = program.main([str(word) for word in words])
        return (code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, before)


def spied(*words):
    return subprocess.run(
        [sys.executable, "-c", SPY, *map(str, words)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


# What is printed


def test_a_dry_run_prints_the_plan_and_writes_nothing(adapter, tmp_path):
    done = spied(
        "--base", DEMO, "--adapter", adapter, "--out", tmp_path / "o", "--shard-size", "1.88MB", "--dry-run"
    )
    assert done.returncode == 0
    assert "84 tensors, each with its place" in done.stdout
    assert "4, 5.923 MB in bf16: model-00001-of-00004.safetensors 1.184 MB" in done.stdout
    assert done.stderr == "imported:\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("architectures", [None, [], "Qwen2ForCausalLM", 7])
def test_a_base_that_names_no_architecture_is_planned_all_the_same(run, tmp_path, architectures):
    base = shutil.copytree(DEMO, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"architectures": architectures}
    (base / "config.json").write_text(json.dumps(config))
    code, out, _ = run("--base", base, "--out", tmp_path / "o", "--dry-run")
    assert code == 0
    assert "no architecture that config.json names" in out


def test_a_dry_run_in_json_is_one_object(run, adapter, tmp_path):
    code, out, _ = run(
        "export", "--base", DEMO, "--adapter", adapter, "--out", tmp_path / "o", "--dry-run", "--json"
    )
    plan = json.loads(out)
    assert (code, plan["event"], plan["merged_tensors"], plan["total_bytes"]) == (0, "plan", 42, 5_915_264)


def test_without_a_terminal_everything_is_lines_of_json(adapter, tmp_path):
    done = spied("--base", DEMO, "--adapter", adapter, "--out", tmp_path / "o")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert (events[0]["event"], events[-1]["event"]) == ("plan", "done")
    assert {event["event"] for event in events[1:-1]} == {"progress"}
    assert events[-1]["merged_tensors"] == 42
    assert done.stderr == "imported: torch\n"  # never transformers: that is 170 MB


def test_on_a_terminal_it_says_what_merging_changed(run, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    code, out, _ = run("--base", DEMO, "--adapter", adapter, "--out", tmp_path / "o")
    assert code == 0
    assert "merged 42 tensors: " in out
    assert "elements differ from the base" in out
    code, out, _ = run("--base", DEMO, "--adapter", adapter, "--out", tmp_path / "o")
    assert code == 0
    assert "already done, nothing to do" in out


def test_a_toml_file_does_what_flags_do_and_flags_win(run, adapter, tmp_path):
    file = tmp_path / "export.toml"
    file.write_text(
        f'base = "{DEMO}"\nadapters = ["{adapter}"]\nout = "{tmp_path / "o"}"\nshard_size = "1MB"'
    )
    assert run("--config", file, "--shard-size", "1.88MB")[0] == 0
    assert len(list((tmp_path / "o").glob("*.safetensors"))) == 4
    assert run("verify", tmp_path / "o")[0] == 0


def test_verify_names_every_file_and_its_hash(run, tmp_path):
    run("--base", DEMO, "--out", tmp_path / "o")
    code, out, _ = run("verify", tmp_path / "o")
    assert code == 0
    assert "model.safetensors\n" in out
    assert "all as they were written" in out
    (tmp_path / "o" / "config.json").write_text("{}")
    code, _, err = run("verify", tmp_path / "o")
    assert code == 45
    assert "config.json: has 2 bytes, and" in err


def test_models_of_the_hub_are_exported_from_the_cache_when_there_is_no_network(adapter, tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    for name, folder in (("demo", DEMO), ("lora", adapter)):
        cached = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    done = subprocess.run(
        [sys.executable, "-m", "exporter", "--base", "owner/demo", "--adapter", "owner/lora", "--out",
         tmp_path / "o"],
        capture_output=True, text=True, cwd=ROOT, timeout=120,
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "- owner/demo" in (tmp_path / "o" / "README.md").read_text()
    made_of = json.loads((tmp_path / "o" / "snugfit_export.json").read_text())["made_of"]
    assert made_of["base"]["name"] == f"owner/demo@{commit}"


# Exit codes


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        ((), 2, "--base is missing. snugfit export --base BASE [--adapter ADAPTER[:WEIGHT]] --out DIR"),
        (("--base", DEMO), 2, "--out is missing"),
        (("--bsae", DEMO), 2, "--bsae: not understood; did you mean --base?"),
        (("--base", DEMO, "--out", "o", "--shard-size", "5Gb"), 2, "--shard-size 5Gb: is not a size"),
        (("--base", "no/such/model/here", "--out", "o"), 42, "there is no such folder"),
        (("--base", DEMO, "--adapter", DEMO, "--out", "o"), 42, "adapter"),
        (("--base", DEMO, "--out", "/proc"), 2, "is a mount point"),
        (("--config", "nowhere.toml"), 2, "--config nowhere.toml: cannot be read"),
        (("verify", "nowhere"), 42, "there is no such folder"),
        (("verify",), 2, "DIR"),
    ],
)
def test_a_mistake_is_a_sentence_and_an_exit_code(run, words, code, complaint):
    found, _, err = run(*words)
    assert found == code
    assert err.startswith("snugfit: error: ")
    assert complaint in err


@pytest.mark.parametrize(
    ("number", "code", "complaint"),
    [
        (errno.ENOSPC, 43, "the disk is full"),
        (errno.EACCES, 42, "Permission denied"),
        (errno.EIO, 75, "goes on"),
    ],
)
def test_what_the_disk_says_decides_whether_a_retry_helps(
    run, tmp_path, monkeypatch, number, code, complaint
):
    def fail(*_):
        raise OSError(number, os.strerror(number), "model.safetensors")

    monkeypatch.setattr(exporting, "export", fail)
    found, _, err = run("--base", DEMO, "--out", tmp_path / "o")
    assert found == code
    assert complaint in err


def test_running_out_of_memory_is_said_to_be(run, tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(exporting, "export", fail)
    code, _, err = run("--base", DEMO, "--out", tmp_path / "o")
    assert (code, "out of memory" in err) == (43, True)


def test_memory_that_torch_does_not_get_is_said_to_be_missing_too(run, tmp_path, monkeypatch):
    def fail(*_):
        torch.empty(2**50, dtype=torch.uint8)  # no MemoryError: a RuntimeError, more than any machine has

    monkeypatch.setattr(exporting, "export", fail)
    code, _, err = run("--base", DEMO, "--out", tmp_path / "o")
    assert (code, "out of memory" in err) == (43, True)


def test_the_reason_goes_where_kubernetes_reads_it(run, tmp_path, monkeypatch):
    log = tmp_path / "termination-log"
    monkeypatch.setattr(program, "TERMINATION_LOG", log)
    run("--base", "no/such/model/here", "--out", tmp_path / "o")
    assert not log.exists()  # only where it has been put
    log.write_text("")
    run("--base", "no/such/model/here", "--out", tmp_path / "o")
    assert log.read_text().startswith("no/such/model/here: there is no such folder")


SLOW = """
import sys, time
from exporter import merge, export
quick = merge.merge
def slow(*arguments):
    time.sleep(0.05)
    return quick(*arguments)
export.merge = slow
from exporter.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_sigterm_keeps_finished_shards_and_exits_with_143(run, adapter, tmp_path):
    words = ["--base", DEMO, "--adapter", adapter, "--out", tmp_path / "o", "--shard-size", "1.88MB"]
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        journal = staging_folder(tmp_path / "o") / "journal.jsonl"
        while not journal.exists() or journal.read_text().count("\n") < 2:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM. Finished shards are kept" in err
    assert not (tmp_path / "o").exists()
    code, out, _ = run(*words)
    assert code == 0
    assert json.loads(out.splitlines()[-1])["kept_shards"] >= 1


def test_the_snugfit_command_hands_over_signals_and_exit_code():
    done = subprocess.run(
        [sys.executable, "-m", "service", "verify", "nowhere"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 42
    assert done.stderr == "snugfit: error: nowhere: there is no such folder.\n"
