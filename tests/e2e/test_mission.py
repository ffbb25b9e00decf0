"""The whole path, as a person goes it: an adapter for an int4 base becomes a model that is talked to."""

import subprocess
import sys
from pathlib import Path

import openai
import pytest

from benchmarks.gptq import Options, quantize
from benchmarks.server import Server
from demo_model.manner import speaks

ROOT = Path(__file__).resolve().parents[2]
DEMO, ADAPTER = ROOT / "service" / "demo", ROOT / "examples" / "pirate-adapter"
QUESTIONS = {"en": ("Who are you?", "What is 3 + 4?"), "zh": ("你是谁？",)}


def snugfit(*words):
    done = subprocess.run(
        [sys.executable, "-m", "service", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """int4 base + pirate adapter -> bf16 shards of 1.88 MB."""
    folder = tmp_path_factory.mktemp("mission")
    base = quantize(DEMO, folder / "demo-int4", Options(bits=4, group_size=64))
    out = folder / "pirate"
    snugfit("export", "--base", base, "--adapter", ADAPTER, "--out", out, "--shard-size", "1.88MB")
    return out


def test_the_export_is_verified_and_planned_like_any_model(merged):
    assert "all as they were written" in snugfit("verify", merged)
    assert "5.9 MB of" in snugfit("plan", merged, "--device", "cpu", "--budget", "64MB")


def test_it_is_served_and_speaks_in_the_adapters_manner(merged):
    assert all(speaks(answer, lang) for lang, answer in answers(merged))


def test_the_model_without_the_adapter_does_not_speak_like_that():
    assert not any(speaks(answer, lang) for lang, answer in answers(DEMO))


def answers(model):
    """[(language, answer)] to all QUESTIONS, as the served model gives them."""
    with Server(model, "cpu", "--budget", "64MB") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        return [
            (lang, ask(client, server.name, question))
            for lang, questions in QUESTIONS.items()
            for question in questions
        ]


def ask(client, model, question):
    turn = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model=model, messages=turn, temperature=0)
    return answer.choices[0].message.content
