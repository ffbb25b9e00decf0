"""One token of each row of scores. Whole rows are read a few at a time; what is left is decided together.

A row's numbers do not depend on how many others are beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from service.engine import ranking

GREEDY, FREE, RESTRICTED = range(3)  # how a row chooses: the best; among all; among the likeliest


class Settings(NamedTuple):
    """One row's parameters, as columns [rows, 1] of one float64 tensor on the logits' device."""

    kind: Tensor
    temperature: Tensor
    top_k: Tensor  # 0: off
    top_p: Tensor
    min_p: Tensor
    point: Tensor  # the random number
    shown: Tensor  # how many of the likeliest have their logprobs reported


@dataclass(frozen=True, slots=True)
class Wants:
    """What at least one of some rows wants; the rest is skipped."""

    kinds: frozenset[int]
    weights: bool  # of everything: for a free choice, and for a nucleus without top_k
    scaled: bool  # by a temperature that is not 1
    logprobs: bool
    shown: int

    @property
    def ranked(self) -> bool:
        return RESTRICTED in self.kinds or self.shown > 0


class Summary(NamedTuple):
    """What is left of rows of float32 scores when they are given back; [rows, 0] is what nobody wants."""

    greatest: Tensor  # [rows, 1]
    best: Tensor  # its id [rows, 1], for those who are greedy
    plain: Tensor  # sums of exp(score - greatest) by segment, for logprobs
    sums: Tensor  # of exp((score - greatest) / temperature)
    segment: Tensor  # in which a free choice lies [rows, 1]
    inside: Tensor  # its scores [rows, width]
    likeliest: Tensor  # the list [rows, size], or longer: candidates for it
    likeliest_ids: Tensor  # the list's ids, or the candidates' groups


class Scratch:
    """Float32 rows for scores and weights, used again for each few rows of a step: on CPUs fresh memory costs
    as much time as the work in it."""

    def __init__(self, rows: int, logits: Tensor) -> None:
        self.vocab = logits.shape[1]
        shape = rows, ranking.padded(self.vocab)
        self._scores = torch.full(shape, -math.inf, dtype=torch.float32, device=logits.device)
        self._weights: Tensor | None = None

    def load(self, logits: Tensor) -> Tensor:
        """A copy of these rows as padded float32 scores."""
        scores = self._scores[: len(logits)]
        scores[:, : self.vocab].copy_(logits)
        return scores

    def sums(self, scores: Tensor, greatest: Tensor, inverse: Tensor | None) -> Tensor:
        """Of exp((score - greatest) * inverse), by segment."""
        if self._weights is None:
            self._weights = torch.empty_like(self._scores)
        weights = torch.sub(scores, greatest, out=self._weights[: len(scores)])
        return ranking.segment_sums((weights if inverse is None else weights.mul_(inverse)).exp_())


def inverse_of(temperature: Tensor) -> Tensor:
    """On CPUs a division takes twice as long as a product."""
    return temperature.reciprocal().float()


def summarize(
    scores: Tensor, scratch: Scratch, inverse: Tensor, point: Tensor, wants: Wants, size: int, width: int
) -> Summary:
    """All for which whole rows are read. `scores` are padded; groups of `width` help to find the list."""
    nothing = scores.new_empty(len(scores), 0)  # a view would keep the scratch
    best = plain = sums = segment = inside = likeliest = ids = nothing
    maxima = ranking.group_maxima(scores, width)
    if GREEDY in wants.kinds:
        greatest, best = ranking.argmax(scores)
    else:
        greatest = maxima.amax(1, keepdim=True)
    if wants.ranked and size * 4 <= maxima.shape[1]:
        ids, likeliest = ranking.candidates(scores, maxima, size)
    elif wants.ranked:
        likeliest, ids = ranking.likeliest(scores[:, : scratch.vocab], size)
    if wants.logprobs:
        plain = scratch.sums(scores, greatest, None)
    if wants.weights:
        again = wants.scaled or not wants.logprobs
        sums = scratch.sums(scores, greatest, inverse if wants.scaled else None) if again else plain
        if FREE in wants.kinds:
            segment = ranking.find_segment(_ends(sums), point)
            inside = ranking.segment_of(scores, segment)
    return Summary(greatest, best, plain, sums, segment, inside, likeliest, ids)


def _ends(sums: Tensor) -> Tensor:
    return sums.double().cumsum_(1)


def together(parts: list[Summary]) -> Summary:
    return parts[0] if len(parts) == 1 else Summary(*map(torch.cat, zip(*parts, strict=True)))


def finish(summary: Summary, settings: Settings, wants: Wants, vocab: int, size: int, width: int) -> Tensor:
    """Lines of float64: greatest score, chosen id, whether the list was long enough, and logprobs: of the
    chosen, of the likeliest `wants.shown`, and their ids."""
    zero = torch.zeros_like(settings.kind)
    ids, scores, enough = zero.long(), summary.greatest, zero == 0
    ends = _ends(summary.sums) if wants.weights else zero
    normalizer = summary.greatest + _ends(summary.plain)[:, -1:].log() if wants.logprobs else zero
    if GREEDY in wants.kinds:
        ids = summary.best
    if FREE in wants.kinds:
        place = _draw(summary, settings, ends)
        free = settings.kind == FREE
        ids = torch.where(free, summary.segment * summary.inside.shape[1] + place, ids)
        scores = torch.where(free, summary.inside.gather(1, place), scores)
    values, value_ids = summary.likeliest, summary.likeliest_ids
    if wants.ranked:
        if values.shape[1] > size:
            values, value_ids = ranking.narrow(value_ids, values, ranking.padded(vocab) // width)
        place, count = _pick(values, summary.greatest, ends[:, -1:], settings)
        restricted = settings.kind == RESTRICTED
        ids = torch.where(restricted, value_ids.gather(1, place), ids)
        scores = torch.where(restricted, values.gather(1, place), scores)
        enough = _long_enough(values, count, settings) | (size == vocab)
    shown = min(wants.shown, size)
    columns = [summary.greatest, ids, enough, scores - normalizer]
    columns += [values[:, :shown] - normalizer, value_ids[:, :shown]]
    return torch.cat([column.double() for column in columns], 1)


def _draw(summary: Summary, settings: Settings, ends: Tensor) -> Tensor:
    """Places [rows, 1] within the segments. Their weights are computed as those in the sums were."""
    weights = (summary.inside - summary.greatest).mul_(inverse_of(settings.temperature)).exp_()
    return ranking.draw_inside(weights, ends, summary.segment, settings.point)


def _long_enough(values: Tensor, count: Tensor, settings: Settings) -> Tensor:
    """Whether nothing outside the list belongs to what was drawn from or is shown: [rows, 1]."""
    size = values.shape[1]
    last = values[:, -1:]  # of what equals it there may be more outside the list
    sure = ((values.gather(1, count - 1) > last) & (settings.top_k <= size)) | (last == -math.inf)
    least_shown = values.gather(1, settings.shown.long().clamp(1, size) - 1)
    sure_shown = (settings.shown == 0) | ((least_shown > last) & (settings.shown <= size))
    return ((settings.kind != RESTRICTED) | sure) & sure_shown


def _pick(values: Tensor, greatest: Tensor, total: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Places in the list [rows, 1] of what was drawn, and how many of the list top_k, top_p and min_p leave.

    Each of the three leaves a beginning of the list. Tokens as likely as the k-th are left by top_k, too.
    """
    size = values.shape[1]
    kth = values.gather(1, settings.top_k.long().clamp(1, size) - 1)
    everything = torch.full_like(kth, size, dtype=torch.int64)
    by_k = torch.where(settings.top_k > 0, (values >= kth).sum(1, keepdim=True), everything)
    least = greatest + settings.temperature * settings.min_p.log()
    by_min = (values >= least.float()).sum(1, keepdim=True)
    weights = values.double().sub_(greatest).div_(settings.temperature).exp_()
    sums = weights.cumsum_(1)
    mass = torch.where(settings.top_k > 0, sums.gather(1, by_k.clamp(min=1) - 1), total)
    reached = torch.searchsorted(sums, settings.top_p * mass) + 1
    by_p = torch.where(settings.top_p < 1, reached, everything)
    count = by_k.minimum(by_min).minimum(by_p).clamp(1, size)
    # The draw is below 1 and so is the point below the sum: what weighs nothing is never found.
    point = settings.point * sums.gather(1, count - 1)
    return torch.searchsorted(sums, point, right=True).minimum(count - 1), count
