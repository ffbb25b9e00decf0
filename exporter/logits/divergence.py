"""How far the logits of two models are apart, from blocks of the vocabulary: whole logits are never held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# Logits that are all zero have no norm to divide by.
_TINY = 1e-300


@dataclass(frozen=True, slots=True)
class Distance:
    """Of one model's logits from a reference's; means over tokens."""

    relative: float  # |logits - reference| / |reference|, Euclidean norms over the vocabulary
    largest: float  # the largest difference of one logit
    kl: float  # Kullback-Leibler divergence of the reference from it, in nats
    top1: float  # share of tokens whose most likely next one is the same


class Logits:
    """One model's next-token distributions, seen block by block: log-sum-exp and the best token so far."""

    def __init__(self, tokens: int) -> None:
        import torch

        self.peak = torch.full((tokens,), -torch.inf, dtype=torch.float64)
        self.best = torch.zeros(tokens, dtype=torch.int64)
        self.sum = torch.zeros(tokens, dtype=torch.float64)  # of exp(logit - peak)

    def add(self, first: int, block: torch.Tensor) -> torch.Tensor:
        """[tokens, rows of the head] in float64, the first of them `first`. Gives by how much sums shrank."""
        values, where = block.max(dim=-1)
        self.best = where.add(first).where(values > self.peak, self.best)
        peak = self.peak.maximum(values)
        shrunk = (self.peak - peak).exp()
        self.sum = self.sum * shrunk + (block - peak[:, None]).exp().sum(dim=-1)
        self.peak = peak
        return shrunk

    @property
    def log_sum_exp(self) -> torch.Tensor:
        return self.peak + self.sum.log()


class Divergence:
    """Of a model's logits from a reference's."""

    def __init__(self, tokens: int) -> None:
        import torch

        self._reference, self._other = Logits(tokens), Logits(tokens)
        self._weighted = torch.zeros(tokens, dtype=torch.float64)  # of exp(r - peak) (r - other)
        self._difference_square = torch.zeros(tokens, dtype=torch.float64)
        self._reference_square = torch.zeros(tokens, dtype=torch.float64)
        self._largest = 0.0

    def add(self, first: int, reference: torch.Tensor, other: torch.Tensor) -> None:
        """[tokens, rows of the head] of both; blocks come in order, and `first` is this one's first row."""
        reference, other = reference.double(), other.double()
        difference = reference - other
        shrunk = self._reference.add(first, reference)
        self._other.add(first, other)
        likely = (reference - self._reference.peak[:, None]).exp()
        self._weighted = self._weighted * shrunk + (likely * difference).sum(dim=-1)
        self._difference_square += difference.square().sum(dim=-1)
        self._reference_square += reference.square().sum(dim=-1)
        # max() would lose NaN
        self._largest = float(difference.abs().amax().maximum(difference.new_tensor(self._largest)))

    def distance(self) -> Distance:
        """After the last block."""
        relative = (self._difference_square / self._reference_square.clamp_min(_TINY)).sqrt()
        kl = self._weighted / self._reference.sum - self._reference.log_sum_exp + self._other.log_sum_exp
        same = (self._reference.best == self._other.best).double()
        return Distance(float(relative.mean()), self._largest, float(kl.mean()), float(same.mean()))
