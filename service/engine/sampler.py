"""Chooses one token from a row of logits."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from service.engine.types import SamplingParams

# A nucleus nearly always lies within so many of the likeliest tokens; then no more than these are sorted.
SHORT_LISTS = (1024, 16384)
PENALIZED_AT_ONCE = 4096  # ids, so that temporaries stay small when a long prompt has most of the vocabulary


class BadLogits(Exception):
    """The model gave NaN or infinity where a score should be, so no token can be chosen."""

    def __init__(self, value: float) -> None:
        self.value = value
        super().__init__(f"the model's logits are not finite ({value}): its weights or its dtype are broken")


class Sampler:
    """One request's choices, from its own random numbers: the same seed gives the same tokens, whoever else
    is served. The numbers are drawn on the CPU, so they are the same on every device.

    Needs at most 6 rows of vocab x 4 bytes beside the logits (loader.footprint counts them).
    """

    def __init__(self, params: SamplingParams, prompt_ids: Iterable[int]) -> None:
        self._params = params
        self._seen = dict.fromkeys(prompt_ids) if params.repetition_penalty != 1 else {}
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed % 2**64)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from logits [vocab] of any float dtype, which are not changed. Raises BadLogits."""
        scores = logits.to(torch.float32, copy=True)
        self._penalize(scores)
        token_id = self._greedy(scores) if self._params.temperature == 0 else self._draw(scores)
        if self._params.repetition_penalty != 1:
            self._seen[token_id] = None
        return token_id

    def _penalize(self, scores: torch.Tensor) -> None:
        """Make what was seen less likely, as transformers' RepetitionPenaltyLogitsProcessor does."""
        if not self._seen:
            return
        penalty = self._params.repetition_penalty
        for seen in torch.tensor(list(self._seen), device=scores.device).split(PENALIZED_AT_ONCE):
            values = scores[seen]
            scores[seen] = torch.where(values < 0, values * penalty, values / penalty)

    def _greedy(self, scores: torch.Tensor) -> int:
        token_id = int(scores.argmax())  # NaN counts as the greatest
        _check(float(scores[token_id]))
        return token_id

    def _draw(self, scores: torch.Tensor) -> int:
        if not 0 < self._params.top_k < len(scores):
            return self._draw_nucleus(self._weights(scores))
        scores, ids = scores.topk(self._params.top_k)  # NaN counts as the greatest here, too
        sums = self._weights(scores).cumsum(0)
        if self._params.top_p < 1:
            sums = _nucleus(sums, float(sums[-1]) * self._params.top_p)
        return int(ids[self._pick(sums)])

    def _weights(self, scores: torch.Tensor) -> torch.Tensor:
        """In place of the scores. Not probabilities: the likeliest has 1, so no temperature overflows."""
        greatest = scores.max()
        _check(float(greatest))
        return scores.sub_(greatest).div_(self._params.temperature).exp_()

    def _draw_nucleus(self, weights: torch.Tensor) -> int:
        if self._params.top_p >= 1:
            return self._pick(weights.cumsum_(0))
        wanted = float(weights.sum()) * self._params.top_p
        for count in SHORT_LISTS:
            if count > len(weights) // 4:
                break
            top, ids = weights.topk(count)
            sums = top.cumsum_(0)
            if float(sums[-1]) >= wanted:
                return int(ids[self._pick(_nucleus(sums, wanted))])
            del top, ids, sums
        weights, ids = weights.sort(descending=True)
        return int(ids[self._pick(_nucleus(weights.cumsum_(0), wanted))])

    def _pick(self, sums: torch.Tensor) -> int:
        """An index, each as likely as it adds to the running sums [n]."""
        total = sums[-1]
        point = torch.rand((), generator=self._random, dtype=torch.float64).to(total) * total
        # Rounding must not push the point beyond the last one that adds something.
        point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
        return min(int(torch.searchsorted(sums, point, right=True)), len(sums) - 1)


def _nucleus(sums: torch.Tensor, wanted: float) -> torch.Tensor:
    """The shortest beginning of the running sums that reaches `wanted`; at least one."""
    count = int(torch.searchsorted(sums, wanted)) + 1
    return sums[:count]


def _check(value: float) -> None:
    if not math.isfinite(value):
        raise BadLogits(value)
