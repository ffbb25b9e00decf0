"""What every peer is asked in a round, and the check that it did that work and no other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.client import Message, NoText, Sample, ask, connect, letters, quantile, together
from benchmarks.limits import Limits, Work
from benchmarks.peers.environment import CannotRun
from benchmarks.peers.server import PeerServer

QUESTION_LETTERS = 32  # of the second turn
ANSWER_LETTERS = 8  # of the answer that stands between the turns
TRIES = 3
SHOWN = 0.9  # of the tokens must be seen one by one
Numbers = dict[str, float]


@dataclass(frozen=True)
class Load:
    """How much is asked, in tokens. A letter is one (see make_model), and the template adds some."""

    prompt: int
    answer: int
    streams: int
    long_prompt: int
    template_tokens: int  # around one question

    def question(self, rng: random.Random, tokens: int) -> list[Message]:
        """A conversation of exactly so many tokens that nobody has seen."""
        return [{"role": "user", "content": letters(rng, tokens - self.template_tokens)}]


def template_tokens(model: Path) -> int:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    empty = [{"role": "user", "content": ""}]
    text = tokenizer.apply_chat_template(empty, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False).input_ids)


@dataclass(frozen=True)
class Client:
    """One peer's server and how it is asked."""

    server: PeerServer
    extra: dict[str, Any]
    load: Load

    def body(self, messages: list[Message], max_tokens: int) -> dict[str, Any]:
        return self.extra | {"messages": messages, "max_tokens": max_tokens, "temperature": 0}

    def alone(self, messages: list[Message], max_tokens: int) -> Sample:
        async def one() -> Sample:
            async with connect(self.server.url) as client:
                return await ask(client, self.body(messages, max_tokens))

        return asyncio.run(one())

    def usage(self, messages: list[Message], max_tokens: int) -> dict[str, Any]:
        """Of an answer that is not streamed, which every server tells."""
        with httpx.Client(base_url=self.server.url, timeout=None) as client:
            response = client.post("/v1/chat/completions", json=self.body(messages, max_tokens))
            response.raise_for_status()
            return dict(response.json()["usage"])


def warm_up(client: Client, rng: random.Random, streams: int) -> None:
    """Every shape once. Raises CannotRun when a prompt is not as long as it must be."""
    load = client.load
    for tokens, answer in ((load.prompt, load.answer), (load.long_prompt, 2)):
        usage = client.usage(load.question(rng, tokens), answer)
        _check(usage["prompt_tokens"], tokens, "prompt")
        _check(usage["completion_tokens"], answer, "answer")
    bodies = [client.body(load.question(rng, load.prompt), 4) for _ in range(streams)]
    asyncio.run(together(client.server.url, bodies))


def measure(client: Client, rng: random.Random, batch: bool) -> Numbers:
    """One round. Raises CannotRun for other work than was asked for."""
    numbers = _decode(client, rng) | _long(client, rng)
    return numbers | _batch(client, rng) if batch else numbers


def _decode(client: Client, rng: random.Random) -> Numbers:
    load = client.load

    def alone() -> tuple[Sample]:
        return (client.alone(load.question(rng, load.prompt), load.answer),)

    (sample,) = _piece_by_piece(alone, load.answer)
    tokens = _tokens(sample, load.prompt, load.answer)
    return {
        "decode_tokens_per_second": (tokens - 1) / sample.decode_seconds,
        "decode_itl_ms": 1e3 * quantile(sample.gaps, 0.5),
        "decode_ttft_ms": 1e3 * sample.first,
    }


def _long(client: Client, rng: random.Random) -> Numbers:
    """A long prompt, and then the next turn of the same conversation."""
    load = client.load

    def turns() -> tuple[Sample, Sample]:
        messages = load.question(rng, load.long_prompt)
        first = client.alone(messages, 2)
        answer = {"role": "assistant", "content": letters(rng, ANSWER_LETTERS)}
        question = {"role": "user", "content": letters(rng, QUESTION_LETTERS)}
        return first, client.alone([*messages, answer, question], 2)

    first, second = _piece_by_piece(turns, 2)
    _tokens(first, load.long_prompt, 2)
    return {"long_ttft_ms": 1e3 * first.first, "second_turn_share": second.first / first.first}


def _piece_by_piece(answers: Callable[[], tuple[Sample, ...]], tokens: int) -> tuple[Sample, ...]:
    """Answers whose tokens can be timed. Random weights may insist on white space, or on a byte that is no
    character, and then some servers show nothing until the end."""
    pieces: list[int] = []
    for _ in range(TRIES):
        try:
            samples = answers()
        except NoText:
            continue
        pieces = [sample.pieces for sample in samples]
        if min(pieces) >= SHOWN * tokens:
            return samples
    raise CannotRun(f"{tokens} tokens came in {pieces} pieces, not one by one")


def _batch(client: Client, rng: random.Random) -> Numbers:
    load = client.load
    bodies = [client.body(load.question(rng, load.prompt), load.answer) for _ in range(load.streams)]
    seconds, samples = asyncio.run(together(client.server.url, bodies))
    tokens = sum(_tokens(sample, load.prompt, load.answer) for sample in samples)
    return {
        "batch_tokens_per_second": tokens / seconds,
        "batch_ttft_ms": 1e3 * quantile([sample.first for sample in samples], 0.5),
        "batch_itl_ms": 1e3 * quantile([gap for sample in samples for gap in sample.gaps], 0.5),
    }


def shares(numbers: Numbers, work: Work, best: Limits, load: Load) -> Numbers:
    """How much of the machine's limit in the same round: 1 is all of it."""
    found = {
        "decode_share": work.step_seconds(best) * numbers["decode_tokens_per_second"],
        "long_share": work.prefill_seconds(best, load.long_prompt) / numbers["long_ttft_ms"] * 1e3,
    }
    if "batch_tokens_per_second" in numbers:
        at_best = (
            load.streams * load.answer / work.batch_seconds(best, load.streams, load.prompt, load.answer)
        )
        found["batch_share"] = numbers["batch_tokens_per_second"] / at_best
    return found


def _tokens(sample: Sample, prompt: int, answer: int) -> int:
    """Tokens of the answer. A server whose streams have no usage has told it when it was warmed up."""
    if sample.prompt_tokens is not None:
        _check(sample.prompt_tokens, prompt, "prompt")
    if sample.completion_tokens is not None:
        _check(sample.completion_tokens, answer, "answer")
    elif sample.pieces > answer:
        raise CannotRun(f"an answer in {sample.pieces} pieces where {answer} tokens were asked for")
    return answer


def _check(found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise CannotRun(f"a {what} of {found} tokens where {wanted} were asked for")
