"""Chooses the next token of each row of a step, each row by its own parameters and random numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loader.footprint import SAMPLED_AT_ONCE
from service.engine.choosing import (
    FREE,
    GREEDY,
    RESTRICTED,
    Scratch,
    Settings,
    Summary,
    Wants,
    finish,
    inverse_of,
    summarize,
    together,
)
from service.engine.penalties import Bias, Seen
from service.engine.ranking import SEGMENTS, argmax
from service.engine.types import Logprobs, SamplingParams

# What top_k, top_p and min_p leave nearly always lies within so many of the likeliest tokens; then no more
# than these are sorted. Beside it how many scores share one maximum in the search for them. The first is for
# rows that are known to need FEW only.
SHORT_LISTS = ((32, 64), (128, 32), (2048, 8))
FEW = 20  # Qwen's top_k, and the most logprobs; there must be room for some that are equal
SMALLEST_TEMPERATURE = 1e-37  # float32 has no normal number much below


class BadLogits(Exception):
    """The model gave NaN or infinity where a score should be, so no token can be chosen."""

    def __init__(self, value: float) -> None:
        self.value = value
        super().__init__(f"the model's logits are not finite ({value}): its weights or its dtype are broken")


@dataclass(frozen=True, slots=True)
class Choice:
    token_id: int
    logprobs: Logprobs | None


class SamplingState:
    """What the choices of one request depend on beside the logits: its parameters, its own random numbers,
    and as much of prompt and answer as its penalties need.

    The random numbers come from the CPU, one for each token of a request with temperature > 0, so they are
    the same on every device and whoever else is served.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self.params = params
        self._generated = 0
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed % 2**64)
        self._point: float | None = None  # drawn, and nothing chosen with it yet
        self._bias = Bias(params.logit_bias)
        self._forbidden = Bias((id_, -math.inf) for id_ in params.stop_token_ids if params.min_tokens > 0)
        repeats = params.repetition_penalty != 1
        penalizes = repeats or params.presence_penalty != 0 or params.frequency_penalty != 0
        self._seen = Seen(prompt_ids if repeats else ()) if penalizes else None

    @property
    def kind(self) -> int:
        params = self.params
        if params.temperature == 0:
            return GREEDY
        return RESTRICTED if params.top_k > 0 or params.top_p < 1 or params.min_p > 0 else FREE

    @property
    def adjusts(self) -> bool:
        """Whether `adjust` changes scores now."""
        return bool(self._bias or self._seen or self._forbids_stops)

    @property
    def plain(self) -> bool:
        """Whether the choice is the argmax of the logits as they are, and nothing but it is wanted."""
        return self.kind == GREEDY and self.params.logprobs is None and not self.adjusts

    @property
    def needs_few(self) -> bool:
        """Whether the FEW likeliest are surely all that are chosen from or shown."""
        few = self.kind != RESTRICTED or 0 < self.params.top_k <= FEW
        return few and (self.params.logprobs or 0) <= FEW

    @property
    def _forbids_stops(self) -> bool:
        return bool(self._forbidden) and self._generated < self.params.min_tokens

    def draw(self) -> float:
        """In [0, 1), with 53 bits. The same until a token is recorded: a step that fails is tried again."""
        if self._point is None:
            self._point = torch.rand((), generator=self._random, dtype=torch.float64).item()
        return self._point

    def adjust(self, scores: Tensor) -> None:
        """Apply logit_bias, min_tokens and the penalties to float32 scores [vocab], in place."""
        if self._bias:
            self._bias.add(scores)
        if self._forbids_stops:  # if they are all that there is, one of them is better than none
            self._forbidden.add(scores, spare=True)
        if self._seen:
            self._seen.penalize(scores, self.params)

    def record(self, token_id: int) -> None:
        self._generated += 1
        self._point = None
        if self._seen is not None:
            self._seen.add(token_id)


class Sampler:
    """Batched choices; a row's choice does not depend on its neighbours.

    On a CPU float32 rows are worked on one after the other: each fits the processor's cache, and sums do not
    depend on how many rows there are. On other devices at most SAMPLED_AT_ONCE exist together. No row needs
    more than 6 rows of vocab x 4 bytes.
    """

    @torch.inference_mode()
    def choose(self, logits: Tensor, states: Sequence[SamplingState]) -> list[Choice | BadLogits]:
        """The next token of each row of logits [rows, vocab], of any float dtype; they are not changed.

        Each is recorded in its state. A row of which nothing can be chosen gives BadLogits in its place.
        All results come from the device in one transfer; only a row for which the first short list was too
        short is looked at once more, alone.
        """
        if all(state.plain for state in states):
            lines = torch.cat([part.double() for part in argmax(logits)], 1).tolist() if states else []
            return [_answer(state, line) for state, line in zip(states, lines, strict=True)]
        settings = _upload(states, logits)
        first, *longer = _lists(logits, states)
        lines = _attempt(logits, states, settings, *first)
        for row, line in enumerate(lines):
            alone = slice(row, row + 1)
            for size, width in longer:
                if line[2] or not math.isfinite(line[0]):
                    break
                (line,) = _attempt(logits[alone], states[alone], settings[alone], size, width)
            lines[row] = line
        return [_answer(state, line) for state, line in zip(states, lines, strict=True)]


def features(rows: int, prompt_ids: Iterable[int]) -> list[SamplingState]:
    """States whose choices need the most memory there is, for a rehearsal.

    Over logits that are all equal no short list is enough, so everything is sorted.
    """
    params = SamplingParams(
        max_tokens=1, top_p=0.999999, min_p=1e-9, repetition_penalty=1.1, frequency_penalty=0.1, seed=0,
        logprobs=20,
    )  # fmt: skip
    prompt_ids = tuple(prompt_ids)
    return [SamplingState(params, prompt_ids) for _ in range(rows)]


def _rows_at_once(logits: Tensor) -> int:
    return 1 if logits.device.type == "cpu" else SAMPLED_AT_ONCE


def _lists(logits: Tensor, states: Sequence[SamplingState]) -> list[tuple[int, int]]:
    """Sizes of lists, and widths of groups, to be tried one after the other; the last list is everything.

    All rows have the first at the same time, which must take less memory than the few rows in float32. On
    CPUs sums of a longer list begin with those of a shorter: there neighbours may choose what is first.
    """
    vocab = logits.shape[1]
    few, some, many = ((max(1, min(size, vocab // 32)), width) for size, width in SHORT_LISTS)
    start = 0 if logits.device.type == "cpu" and all(state.needs_few for state in states) else 1
    long = [many] if SHORT_LISTS[2][0] * 4 <= vocab else []
    return [*(few, some)[start:], *long, (vocab, SEGMENTS)]


def _upload(states: Sequence[SamplingState], logits: Tensor) -> Tensor:
    """The states' Settings as float64 [rows, 7] on the logits' device; draws one random number for each."""
    vocab = logits.shape[1]
    lines = []
    for state in states:
        params, greedy = state.params, state.kind == GREEDY
        lines.append(
            (
                state.kind,
                1.0 if greedy else max(params.temperature, SMALLEST_TEMPERATURE),
                params.top_k if params.top_k < vocab else 0,
                params.top_p,
                params.min_p,
                0.0 if greedy else state.draw(),
                min(params.logprobs or 0, vocab),
            )
        )
    return torch.tensor(lines, dtype=torch.float64).to(logits.device)


def _attempt(
    logits: Tensor, states: Sequence[SamplingState], settings: Tensor, size: int, width: int
) -> list[list[float]]:
    """Choose with a list of the `size` likeliest: a line for each row, as `_answer` reads it."""
    columns, vocab = Settings(*settings.split(1, 1)), logits.shape[1]
    wants = _wants(states, vocab)
    summary = together(_read(logits, states, columns, wants, size, width))
    return finish(summary, columns, wants, vocab, size, width).tolist()


def _read(
    logits: Tensor, states: Sequence[SamplingState], settings: Settings, wants: Wants, size: int, width: int
) -> list[Summary]:
    step = min(_rows_at_once(logits), len(states))
    scratch, inverse = Scratch(step, logits), inverse_of(settings.temperature)
    parts = []
    for start in range(0, len(states), step):
        part = slice(start, start + step)
        scores = scratch.load(logits[part])
        for row, state in enumerate(states[part]):
            if state.adjusts:
                state.adjust(scores[row, : logits.shape[1]])
        parts.append(summarize(scores, scratch, inverse[part], settings.point[part], wants, size, width))
    return parts


def _whole_nucleus(params: SamplingParams, vocab: int) -> bool:
    return params.temperature > 0 and params.top_p < 1 and not 0 < params.top_k < vocab


def _wants(states: Sequence[SamplingState], vocab: int) -> Wants:
    params = [state.params for state in states]
    return Wants(
        kinds=frozenset(state.kind for state in states),
        weights=any(state.kind == FREE or _whole_nucleus(state.params, vocab) for state in states),
        scaled=any(each.temperature != 1 for each in params),
        logprobs=any(each.logprobs is not None for each in params),
        shown=max(each.logprobs or 0 for each in params),
    )


def _answer(state: SamplingState, line: list[float]) -> Choice | BadLogits:
    if not math.isfinite(line[0]):
        return BadLogits(line[0])
    token_id, wanted = int(line[1]), state.params.logprobs
    state.record(token_id)
    if wanted is None:
        return Choice(token_id, None)
    shown = (len(line) - 4) // 2
    logprobs, ids = line[4 : 4 + shown], line[4 + shown :]
    top = tuple((int(each), logprob) for each, logprob in zip(ids, logprobs, strict=True))
    return Choice(token_id, Logprobs(line[3], top[:wanted]))
