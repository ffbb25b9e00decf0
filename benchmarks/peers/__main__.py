"""snugfit and its peers on one machine: python -m benchmarks.peers MODEL [--peers …] [--rounds 5].

Starts each peer's server itself, from a virtual environment of its own under build/peers (made when missing:
minutes, llama.cpp is compiled), all with the same weights, bf16 and as many threads. In each round the limits
of the machine are measured, and then every peer, in turning order, answers: one request of 128 tokens with 64
more; a prompt of 1,024 tokens, and the next turn of that conversation; 16 requests at once (a peer that
serves one after the other does so in the first round only). While one is measured, the others are stopped
(SIGSTOP). Numbers are medians over the rounds; ratios and shares of the limit are taken round by round. The
tokens in and out are checked. A peer that cannot be installed, started or trusted is a row that says so.
MODEL is a folder written by benchmarks.make_model: its tokenizer makes prompts of exactly N tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

import httpx
import torch

from benchmarks.client import ServerError
from benchmarks.limits import Limits, Work, limits
from benchmarks.peers.cases import Client, Load, measure, shares, template_tokens, warm_up
from benchmarks.peers.environment import CannotRun
from benchmarks.peers.recipes import BUILD, RECIPES, Recipe, Start
from benchmarks.peers.server import PeerServer
from benchmarks.peers.table import Results, summary
from benchmarks.port import free_port
from benchmarks.server import elsewhere

SPOILT = (CannotRun, ServerError, httpx.HTTPError)


def without_end(model: Path) -> Path:
    """A folder with the same files that names no end of text, since not every peer can ignore it."""
    folder = BUILD / "models" / model.name
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        link = folder / file.name
        link.unlink(missing_ok=True)
        if file.name == "generation_config.json":
            link.write_text(json.dumps({"do_sample": False}))
        else:
            link.symlink_to(file.resolve())
    return folder.absolute()


class Contest:
    """The servers that run, and what was measured of them."""

    def __init__(self, load: Load, work: Work, device: str) -> None:
        self.load, self._work, self._device = load, work, device
        self.results = Results()
        self.limits: list[Limits] = []
        self._running: dict[str, tuple[Client, ExitStack]] = {}

    def enter(self, recipe: Recipe, start: Start) -> None:
        """Start a server, ask it everything once, stop it in its tracks; or note why not."""
        print(f"starting {recipe.name} …", flush=True)
        with ExitStack() as opened:
            try:
                launch = recipe.launch(start)
                log = BUILD / f"{recipe.name}.log"
                server = opened.enter_context(PeerServer(launch.command, launch.environ, start.port, log))
                client = Client(server, launch.body, self.load)
                rng = random.Random(recipe.name)
                server.wait_until_ready(client.body(self.load.question(rng, self.load.prompt), 2))
                warm_up(client, rng, self.load.streams if recipe.batches else 1)
                server.pause()
            except SPOILT as err:
                self.results.failed[recipe.name] = _reason(err)
                print(f"{recipe.name}: {_reason(err)}", flush=True)
                return
            self._running[recipe.name] = client, opened.pop_all()
            self.results.rounds[recipe.name] = []

    def round(self, number: int) -> None:
        best = elsewhere(limits, self._device)
        self.limits.append(best)
        print(f"round {number + 1}: {best}", flush=True)
        for name in self._order(number):
            client, _ = self._running[name]
            self.results.rounds[name].append(None)
            client.server.go_on()
            try:
                batch = RECIPES[name].batches or number == 0
                numbers = measure(client, random.Random(f"{name} {number}"), batch)
            except SPOILT as err:
                self._drop(name, _reason(err))
                continue
            client.server.pause()
            numbers |= shares(numbers, self._work, best, self.load)
            self.results.rounds[name][-1] = numbers
            print(
                f"  {name}: {json.dumps({key: round(value, 2) for key, value in numbers.items()})}",
                flush=True,
            )

    def close(self) -> None:
        for name in list(self._running):
            self._leave(name)

    def _order(self, number: int) -> Iterator[str]:
        names = list(self._running)
        turn = number % len(names) if names else 0
        yield from names[turn:] + names[:turn]

    def _drop(self, name: str, reason: str) -> None:
        print(f"  {name}: {reason}", flush=True)
        self.results.failed[name] = reason
        self._leave(name)

    def _leave(self, name: str) -> None:
        _, opened = self._running.pop(name)
        opened.close()


def _reason(err: Exception) -> str:
    if isinstance(err, httpx.HTTPStatusError):
        return f"answered {err.response.status_code}"
    return f"{err}" if isinstance(err, CannotRun) else f"{type(err).__name__}: {err}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--peers", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:N; there only snugfit and transformers")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of each server, on the CPU"
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--long-prompt-tokens", type=int, default=1024)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--here", action="store_true", help="transformers from this environment, not its own")
    return parser.parse_args()


def _stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    sys.exit(128 + number)  # by way of every `finally`: no server is left behind


def main() -> None:
    arguments = _arguments()
    signal.signal(signal.SIGTERM, _stop)
    model, work = without_end(arguments.model), Work.of(arguments.model)
    load = Load(
        arguments.prompt_tokens, arguments.tokens, arguments.streams, arguments.long_prompt_tokens,
        template_tokens(model),
    )  # fmt: skip
    contest = Contest(load, work, arguments.device)
    with ExitStack() as opened:
        opened.callback(contest.close)
        for name in arguments.peers:
            recipe = RECIPES[name]
            if arguments.device != "cpu" and not recipe.cuda:
                contest.results.failed[name] = "is not measured on a GPU here"
                continue
            start = Start(
                model, free_port(), arguments.threads, arguments.device, arguments.context, load.streams,
                arguments.here,
            )  # fmt: skip
            contest.enter(recipe, start)
        for number in range(arguments.rounds):
            contest.round(number)
    print(contest.results.table(arguments.peers, load.streams, load.long_prompt))
    result = {
        "benchmark": "peers",
        "model": arguments.model.name,
        "device": arguments.device,
        "threads": arguments.threads,
        "load": {
            "prompt_tokens": load.prompt, "tokens": load.answer, "streams": load.streams,
            "long_prompt_tokens": load.long_prompt,
        },
        "machine": [best.row() for best in contest.limits],
        "peers": summary(contest.results, arguments.peers),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
