import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families as parse
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.make_model import make

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEADLINE_S = 30
SERVER_DEADLINE_S = 120
NAME, CONTEXT = "tiny-qwen2", 4096
HELLO = [{"role": "user", "content": "Say hello."}]


class Program:
    """serve_scripted.py as a process; `log()` is its stderr so far."""

    def __init__(self, environment, log_file):
        self._log_file = log_file
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SNUGFIT_", "CUDA_", "FAKE_NVML"))}
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log_file.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "serve_scripted.py")],
                env={**clean, "PYTHONPATH": os.pathsep.join(paths), **environment},
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.url = self.process.stdout.readline().strip()
        assert self.url, self.log()

    def wait_until_ready(self):
        deadline = time.monotonic() + DEADLINE_S
        while not self._ready():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)

    def get(self, path):
        return httpx.get(self.url + path, timeout=DEADLINE_S)

    def log(self):
        return self._log_file.read_text(encoding="utf-8")

    def stop(self):
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self.process.stdout.close()

    def _ready(self):
        try:
            return self.get("/ready").status_code == 200
        except httpx.TransportError:
            return False


@pytest.fixture
def program(tmp_path):
    """`with program(NAME="value") as running:` a service that is ready."""

    @contextmanager
    def run(**environment):
        running = Program(environment, tmp_path / "stderr.log")
        try:
            running.wait_until_ready()
            yield running
        finally:
            running.stop()

    return run


class Server:
    """`snugfit serve MODEL` on a free port."""

    def __init__(self, model, folder):
        self._stdout, self._stderr = folder / "stdout", folder / "stderr"
        flags = ["--device", "cpu", "--budget", "300MB", "--port", "0", "--dtype", "float32"]
        flags += ["--context", str(CONTEXT), "--concurrency", "2"]
        environment = {k: v for k, v in os.environ.items() if not k.upper().startswith("SNUGFIT_")}
        with self._stdout.open("w") as out, self._stderr.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "service", "serve", str(model), *flags],
                stdout=out, stderr=err, cwd=ROOT, env=environment,
            )  # fmt: skip

    def start(self):
        self._until(lambda: re.search(r"http://127\.0\.0\.1:\d+", self.said()))
        self.url = re.search(r"http://127\.0\.0\.1:\d+", self.said())[0]
        self._until(lambda: self.get("/ready").status_code == 200)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="any", max_retries=0, timeout=SERVER_DEADLINE_S
        )

    def said(self):
        return self._stdout.read_text(encoding="utf-8")

    def log(self):
        return self._stderr.read_text(encoding="utf-8")

    def get(self, path):
        return httpx.get(self.url + path, timeout=SERVER_DEADLINE_S)

    def ask(self, messages=HELLO, **more):
        options = {"model": NAME, "temperature": 0, "max_tokens": 24, **more}
        return self.client.chat.completions.create(messages=messages, **options)

    def answer(self, messages=HELLO, **more):
        return self.ask(messages, **more).choices[0].message.content

    def metrics(self):
        """Name to value; of several series with one name, by what tells them apart: (name, "cpu")."""
        found = {}
        for sample in (sample for family in parse(self.get("/metrics").text) for sample in family.samples):
            labels = [value for name, value in sample.labels.items() if name != "model"]
            found[(sample.name, *labels) if labels else sample.name] = sample.value
        return found

    def stop(self):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(SERVER_DEADLINE_S)

    def _until(self, condition):
        deadline = time.monotonic() + SERVER_DEADLINE_S
        while not condition():
            assert self.process.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.05)


class Reference:
    """The same checkpoint in transformers alone."""

    def __init__(self, folder):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, messages):
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    @torch.inference_mode()
    def answer(self, messages, max_tokens):
        ids = self.ids(messages)
        whole = self.model.generate(torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False)
        return self.tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = make("tiny", tmp_path_factory.mktemp("models") / NAME)
    (shard,) = folder.glob("*.safetensors")
    # With the family's own small weights and tied embeddings, a random model repeats its last token for ever.
    tensors = {name: t if "norm" in name else t * 15 for name, t in load_file(shard).items()}
    save_file(tensors, shard, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def reference(checkpoint):
    return Reference(checkpoint)


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory):
    one = Server(checkpoint, tmp_path_factory.mktemp("logs"))
    try:
        one.start()
        yield one
    finally:
        one.stop()
