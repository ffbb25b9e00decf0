"""The real command in a process of its own: exit codes, stdout and stderr, and what is imported."""

import json
import os
import shlex
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from loader.usage import nearest
from service.misfit import size_text
from service.plan_command import yaml_text

ROOT = Path(__file__).resolve().parents[2]
CLEAN = {name: value for name, value in os.environ.items() if not name.upper().startswith("SNUGFIT_")}
HEAVY = ("torch", "transformers", "accelerate", "fastapi", "uvicorn")
HIDDEN, MLP, VOCABULARY, LAYERS = 64, 128, 1024, 2
# Runs the command, then tells on stderr which heavy packages it has imported.
SPY = f"""
import sys
from service.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stopped:
    code = stopped.code
print("imported:", *[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""


# A server that ends at once; then, at the end of the process, what its collections leave out.
LAST_COLLECTIONS = """
import gc, os, sys, types

def serve(*_):
    gc.callbacks.append(lambda phase, _: os.write(1, b"left out: %d\\n" % gc.get_freeze_count()))
    return 0

sys.modules["service.server"] = types.SimpleNamespace(run=serve)
from service.cli import main
sys.exit(main(["serve", "--port", "0"]))
"""


def snugfit(*argv, encoding="utf-8", **environment):
    return subprocess.run(
        [sys.executable, "-m", "service", *map(str, argv)],
        capture_output=True, encoding=encoding, cwd=ROOT, timeout=60, env={**CLEAN, **environment},
    )  # fmt: skip


def spied(*argv, **environment):
    return subprocess.run(
        [sys.executable, "-c", SPY, *map(str, argv)],
        capture_output=True, encoding="utf-8", cwd=ROOT, timeout=60, env={**CLEAN, **environment},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with the config and the headers of a Qwen2 of 0.4 MB; its weights are zeros."""
    folder = tmp_path_factory.mktemp("models") / "tiny-qwen2"
    write_model(folder)
    return folder


def write_model(folder):
    folder.mkdir()
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS, "intermediate_size": MLP, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCABULARY, "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in tensors():
        n_bytes = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + n_bytes]}
        end += n_bytes
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def tensors():
    yield "model.embed_tokens.weight", [VOCABULARY, HIDDEN]
    yield "model.norm.weight", [HIDDEN]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{prefix}{name}.weight", [HIDDEN]
        for name, rows in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2)):
            yield f"{prefix}self_attn.{name}_proj.weight", [rows, HIDDEN]
            yield f"{prefix}self_attn.{name}_proj.bias", [rows]
        yield f"{prefix}self_attn.o_proj.weight", [HIDDEN, HIDDEN]
        yield f"{prefix}mlp.gate_proj.weight", [MLP, HIDDEN]
        yield f"{prefix}mlp.up_proj.weight", [MLP, HIDDEN]
        yield f"{prefix}mlp.down_proj.weight", [HIDDEN, MLP]


ON_CPU = ("--device", "cpu", "--budget", "2GB")
QUICK = {
    "help": (0, ["--help"]),
    "no command": (0, []),
    "version": (0, ["--version"]),
    "version of serve": (0, ["serve", "--version"]),
    "help of plan": (0, ["plan", "--help"]),
    "help of serve": (0, ["serve", "--help"]),
    "help of chat": (0, ["chat", "--help"]),
    "a plan": (0, ["plan", "MODEL", *ON_CPU]),
    "a plan as JSON": (0, ["plan", "MODEL", *ON_CPU, "--json"]),
    "a plan for a card elsewhere": (0, ["plan", "MODEL", "--gpu", "16GiB"]),
    "what the chart needs": (0, ["plan", "MODEL", *ON_CPU, "--helm-values"]),
    "a model that does not fit": (43, ["plan", "MODEL", "--device", "cpu", "--budget", "1MB"]),
    "a service that does not fit": (
        43,
        ["serve", "MODEL", "--device", "cpu", "--budget", "1MB", "--port", "0"],
    ),
    "a budget that is none": (2, ["plan", "MODEL", "--budget", "much"]),
    "a model that is not there": (42, ["plan", "no/such/folder/at/all", *ON_CPU]),
    "an unknown command": (2, ["plna"]),
    "an unknown flag": (2, ["serve", "--prot", "1"]),
    "a bad value": (2, ["serve", "--port", "x"]),
    "a settings file that is not there": (2, ["serve", "--config", "no.toml"]),
}


@pytest.mark.parametrize("case", QUICK)
def test_it_answers_with_its_exit_code_in_plain_words_and_imports_nothing_heavy(case, model):
    code, argv = QUICK[case]
    done = spied(*(model if word == "MODEL" else word for word in argv))
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "imported:"
    assert "Traceback" not in done.stderr
    assert ("snugfit: error: " in done.stderr) == (code != 0)
    assert bool(done.stdout) == (code == 0 or case == "a model that does not fit")


@pytest.mark.parametrize(
    ("argv", "advice"),
    [
        (["--budget", "1GB"], "snugfit serve --budget"),
        (["/models/mine"], "snugfit serve /models/mine"),
        (["srve"], "did you mean serve?"),
        (["--hlep"], "did you mean --help?"),
    ],
)
def test_what_lacks_its_command_is_told_where_it_belongs(argv, advice):
    done = spied(*argv)
    assert done.returncode == 2
    assert advice in done.stderr


def test_an_unknown_variable_stops_every_command_that_reads_settings(model):
    for command in ("plan", "serve", "chat"):
        done = snugfit(command, model, SNUGFIT_BUGDET="1GB")
        assert done.returncode == 2
        assert "did you mean SNUGFIT_BUDGET?" in done.stderr


def test_json_stands_alone_on_stdout_with_the_promised_keys(model):
    done = snugfit("plan", model, *ON_CPU, "--json", "--log-level", "debug")
    plan = json.loads(done.stdout)
    assert plan["fits"] is True
    assert plan.keys() >= {
        "weights_bytes", "resident_bytes", "offloaded_bytes", "kv_bytes_per_token", "kv_tokens", "device_map",
        "max_memory", "devices",
    }  # fmt: skip
    assert all(device["peak_bytes"] <= device["budget_bytes"] for device in plan["devices"])


def test_a_misfit_as_json_has_the_numbers_and_exits_with_43(model):
    done = snugfit("plan", model, "--device", "cpu", "--budget", "1MB", "--json")
    misfit = json.loads(done.stdout)
    assert done.returncode == 43
    assert misfit["fits"] is False
    assert misfit["have_bytes"] == 10**6 < misfit["smallest_bytes"]
    assert misfit["weights_bytes"] > 0
    assert misfit["kv_bytes_per_token"] == 2 * LAYERS * 2 * HIDDEN // 2
    assert misfit["need_bytes"] > 10**6
    assert misfit["device"] == "cpu"
    assert misfit["hint"]


def test_the_command_that_a_misfit_offers_works(model):
    done = snugfit("plan", model, "--device", "cpu", "--budget", "1MB", "--context", "512")
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[:2] == ["snugfit", "plan"]
    assert snugfit(*command[1:]).returncode == 0


def test_helm_values_are_yaml(model):
    done = snugfit("plan", model, *ON_CPU, "--helm-values")
    assert isinstance(yaml.safe_load(done.stdout), dict)


def test_nested_values_become_yaml_that_reads_back():
    values = {"a": {"b": {"c": 1, "d": "on: off"}, "e": [1, "x"]}, "f": None, "g": True, "h": {}}
    assert yaml.safe_load(yaml_text(values)) == values


def test_without_a_model_the_built_in_one_is_planned():
    done = snugfit("plan", "--device", "cpu", "--budget", "64MB")
    assert done.returncode == 0, done.stderr


def test_a_traceback_is_only_shown_at_log_level_debug(model):
    argv = ("plan", model, "--device", "cpu", "--budget", "1MB")
    assert "Traceback" in snugfit(*argv, "--log-level", "debug").stderr
    assert "Traceback" not in snugfit(*argv).stderr


def test_a_card_and_a_budget_contradict_each_other_but_the_environment_gives_way(model):
    done = snugfit("plan", model, "--gpu", "16GiB", "--max-memory", "0=1GB")
    assert (done.returncode, "--gpu and --max-memory" in done.stderr) == (2, True)
    done = snugfit("plan", model, "--gpu", "16GiB", "--budget", "2GB", "--json")
    assert [d["budget_bytes"] for d in json.loads(done.stdout)["devices"]] == [2 * 10**9]
    done = snugfit("plan", model, "--gpu", "16GiB", "--json", SNUGFIT_BUDGET="1MB")
    assert done.returncode == 0, done.stderr


def test_a_plan_reads_the_file_that_serve_would_read(model, tmp_path):
    config = tmp_path / "snugfit.toml"
    config.write_text(
        f'model = {json.dumps(str(model))}\nbudget = "2GB"\ndevice = "cpu"\ncontext = 777\nport = 9'
    )
    assert json.loads(snugfit("plan", "--config", config, "--json").stdout)["context"] == 777


def test_a_terminal_of_another_code_page_gets_question_marks_and_no_traceback(tmp_path):
    folder = tmp_path / "模型"
    write_model(folder)
    done = snugfit("plan", folder, *ON_CPU, encoding="cp1252", PYTHONIOENCODING="cp1252")
    assert done.returncode == 0, done.stderr
    assert "??" in done.stdout


def test_a_taken_port_is_told_before_a_model_is_looked_at():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = spied("serve", "no/such/model/at/all", "--port", port)
    assert done.returncode == 2
    assert f"port {port} on 127.0.0.1 is taken" in done.stderr
    assert done.stderr.splitlines()[-1] == "imported:"


def test_a_host_that_is_not_ours_is_told():
    done = snugfit("serve", "--host", "192.0.2.1", "--port", "0")
    assert done.returncode == 2
    assert "192.0.2.1" in done.stderr


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_reader_that_leaves_early_causes_no_noise(model, form):
    plan = subprocess.Popen(
        [sys.executable, "-m", "service", "plan", str(model), *ON_CPU, *form],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, env=CLEAN,
    )  # fmt: skip
    plan.stdout.close()
    with plan.stderr:
        errors = plan.stderr.read()
    assert (plan.wait(60), errors) == (1, b"")


def test_a_size_is_rounded_up_never_down():
    assert [size_text(n) for n in (7_883_112_448, 64_000_001, 999_999, 10**9)] == [
        "7.89GB", "64.1MB", "1MB", "1GB",
    ]  # fmt: skip


def test_the_nearest_name_is_only_named_when_it_is_near():
    assert nearest("--bugdet", ["--budget", "--host"]) == "; did you mean --budget?"
    assert nearest("xyz", ["--budget", "--host"]) == ""


def test_a_server_ends_without_a_look_at_everything_that_was_imported():
    """With torch that took 2 s."""
    done = subprocess.run(
        [sys.executable, "-c", LAST_COLLECTIONS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env=CLEAN,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.rpartition("left out: ")[2]) > 10_000
