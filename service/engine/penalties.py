"""Changes the scores of single tokens: adds what a client wants, lowers what was there before."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from service.engine.types import SamplingParams

PENALIZED_AT_ONCE = 4096  # ids, so that temporaries stay small when a long prompt has most of the vocabulary


class Bias:
    """What is added to the scores of some tokens; -inf makes one impossible. Ids that the model does not have
    are left out: they must not stop the whole step. Of an id that is there twice both values are added."""

    def __init__(self, biases: Iterable[tuple[int, float]]) -> None:
        sums: dict[int, float] = {}
        for token_id, bias in biases:
            sums[token_id] = sums.get(token_id, 0.0) + bias
        self._ids = torch.tensor(list(sums), dtype=torch.int64)
        self._values = torch.tensor(list(sums.values()), dtype=torch.float32)
        self._vocab: int | None = None

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, scores: Tensor, spare: bool = False) -> None:
        """To scores [vocab], in place. `spare`: not if it is every token that has a bias."""
        if self._vocab != len(scores):  # once: the model stays the same
            known = (self._ids >= 0) & (self._ids < len(scores))
            self._ids, self._values = self._ids[known], self._values[known]
            self._ids, self._values = self._ids.to(scores.device), self._values.to(scores.device)
            self._vocab = len(scores)
        if not (spare and len(self) == len(scores)):
            scores.index_add_(0, self._ids, self._values)


class Seen:
    """Tokens of prompt and answer, each once, and how often each is in the answer."""

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self._ids = torch.tensor(list(self._places), dtype=torch.int32)
        self._counts = torch.zeros(len(self._places), dtype=torch.float32)

    def __len__(self) -> int:
        return len(self._places)

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._ids):
            grow = max(64, place // 4)
            self._ids = torch.cat([self._ids, self._ids.new_zeros(grow)])
            self._counts = torch.cat([self._counts, self._counts.new_zeros(grow)])
        self._ids[place] = token_id
        self._counts[place] += 1

    def penalize(self, scores: Tensor, params: SamplingParams) -> None:
        """Repetition as transformers' RepetitionPenaltyLogitsProcessor, presence and frequency as OpenAI."""
        for start in range(0, len(self), PENALIZED_AT_ONCE):
            part = slice(start, min(start + PENALIZED_AT_ONCE, len(self)))
            ids = self._ids[part].to(scores.device, torch.int64)
            values = scores[ids]
            if params.repetition_penalty != 1:
                penalty = params.repetition_penalty
                values = torch.where(values < 0, values * penalty, values / penalty)
            if params.presence_penalty != 0 or params.frequency_penalty != 0:
                counts = self._counts[part].to(scores.device)
                values -= counts.clamp(max=1) * params.presence_penalty + counts * params.frequency_penalty
            scores[ids] = values
