"""The real service over a model that only takes its time: python -m benchmarks.paced PLAN.json --read 200 …

HTTP, templates, scheduler, KV pool with the plan's blocks, prefix reuse and metrics are those of `snugfit
serve`. In place of the forward it sleeps as long as deployment.capacity says that a step of these rows takes
on a card, so that many replicas share a machine that has none. Prints its URL; stops on SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.make_model import make, write_tokenizer
from benchmarks.replica import Replica
from deployment.capacity import Card, Fit, step_seconds
from loader.kv_layout import KvGroup, KvLayout
from service import logs
from service.app import create_app
from service.backend import Backend, Progress
from service.engine.engine import StepEngine
from service.engine.rows import Row, nothing
from service.prompt.defaults import GenerationDefaults
from service.prompt.template import ChatTemplate
from service.server import serve
from service.settings import Settings

NAME = "paced"
MODEL, GPU = "7b", "24GB"  # that is planned when no plan is given
VOCAB = 300  # a row of logits for each request is made and searched: 152,064 would cost this machine's time


class PacedRunner:
    """A StepRunner whose steps take the time that the plan and the card give them."""

    vocab, prefix_reuse, one_state = VOCAB, True, False

    def __init__(self, plan: dict[str, Any], card: Card, liked: int) -> None:
        self._fit, self._card = Fit.of(plan), card
        self.context, self.concurrency = plan["context"], plan["concurrency"]
        self.chunk_tokens = plan["chunk_tokens"]
        groups = tuple(KvGroup(g["window"], tuple(g["layers"]), g["blocks"]) for g in plan["kv"]["groups"])
        self.layout = KvLayout(plan["kv"]["block_tokens"], groups)
        self._logits = torch.zeros(self.concurrency, VOCAB)
        self._logits[:, liked] = 1

    def step(self, rows: Sequence[Row], meanwhile: Callable[[], None] = nothing) -> torch.Tensor:
        began = time.monotonic()
        meanwhile()
        answers = [row for row in rows if len(row.ids) == 1]
        prompt_tokens = sum(len(row.ids) for row in rows) - len(answers)
        held = sum(row.start for row in rows)
        takes = step_seconds(self._fit, self._card, len(answers), held, prompt_tokens)
        time.sleep(max(0.0, began + takes - time.monotonic()))
        return self._logits[: sum(row.sample for row in rows)]

    def recover(self) -> None: ...

    def close(self) -> None: ...


def backend(plan: dict[str, Any], card: Card, settings: Settings, progress: Progress) -> Backend:
    progress.enter("starting the engine")
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder), VOCAB)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate(tokenizer, NAME)
    runner = PacedRunner(plan, card, liked=tokenizer.get_vocab()["a"])
    engine = StepEngine(runner, tokenizer, settings.max_queue, settings.max_wait_seconds)
    opened = ExitStack()
    opened.callback(engine.close)
    return Backend(
        engine=engine,
        template=template,
        context=runner.context,
        defaults=GenerationDefaults(temperature=0.0),
        created=int(time.time()),
        dtype=plan["dtype"],
        opened=opened,
    )


def body(prompt: str, tokens: int, before: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    messages = [*before, {"role": "user", "content": prompt}]
    return {"model": NAME, "messages": messages, "max_tokens": tokens, "ignore_eos": True}


def paced(plan: Path, arguments: argparse.Namespace, log: Path) -> Callable[[], Replica]:
    """Starts this file as a replica of the plan, on the card that the arguments describe."""
    flags = ["--read", str(arguments.read), "--tflops", str(arguments.tflops), "--copy", str(arguments.copy)]

    def start() -> Replica:
        return Replica(["-m", "benchmarks.paced", str(plan), *flags], log)

    return start


def plan_for(rows: int, folder: Path) -> Path:
    """`snugfit plan --json` of the 7B, made from headers alone."""
    make(MODEL, folder / MODEL, headers_only=True)
    command = [sys.executable, "-m", "service", "plan", str(folder / MODEL), "--gpu", GPU]
    command += ["--concurrency", str(rows), "--json"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    (folder / "plan.json").write_text(said.stdout)
    return folder / "plan.json"


def add_card(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--read", type=float, default=200.0, help="GB/s that the card reads its memory with")
    parser.add_argument("--tflops", type=float, default=60.0, help="TFLOP/s of its matrix products")
    parser.add_argument("--copy", type=float, default=10.0, help="GB/s of offloaded weights")


def card_of(arguments: argparse.Namespace) -> Card:
    return Card(arguments.read * 1e9, arguments.tflops * 1e12, arguments.copy * 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", type=Path, help="what `snugfit plan --json` printed")
    add_card(parser)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plan, card = json.loads(arguments.plan.read_text()), card_of(arguments)
    settings = Settings(served_model_name=NAME, log_level="warning")
    logs.to_stderr(settings.log_level)
    listener = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    app = create_app(settings, lambda progress: backend(plan, card, settings, progress))
    sys.exit(serve(app, listener))


if __name__ == "__main__":
    main()
