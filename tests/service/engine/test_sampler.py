import math
import time
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from service.engine.sampler import SHORT_LISTS, BadLogits, Sampler
from service.engine.types import SamplingParams

VOCAB = 151_936
EVERYTHING = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.3}


def logits_of(vocab=50, seed=0, scale=3.0):
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def sampler(prompt_ids=(), **params):
    return Sampler(SamplingParams(max_tokens=1, **params), prompt_ids)


def choices(logits, count, **params):
    one = sampler(**params)
    return [one.choose(logits) for _ in range(count)]


class StorageTracker(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time; tensors that share a storage count once."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.made = [ref for ref in self.made if ref() is not None]
        storages = [ref().untyped_storage() for ref in self.made]
        self.peak = max(self.peak, sum({x._cdata: x.nbytes() for x in storages}.values()))
        return result


def test_temperature_0_is_the_argmax():
    logits = logits_of(VOCAB)
    assert choices(logits, 3, temperature=0) == [int(logits.argmax())] * 3


def test_of_equal_scores_greedy_takes_what_argmax_takes():
    logits = torch.tensor([1.0, 5.0, 5.0, 5.0], dtype=torch.bfloat16)
    assert choices(logits, 1, temperature=0) == [int(logits.float().argmax())]


def test_logits_are_left_as_they_were():
    logits = logits_of()
    before = logits.clone()
    choices(logits, 3, seed=1, **EVERYTHING)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.6},
        EVERYTHING,
    ],
)
def test_tokens_come_as_often_as_transformers_would_have_it(params):
    logits, prompt_ids = logits_of(), [3, 4, 5, 6, 3]
    full = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, **params}
    scores = RepetitionPenaltyLogitsProcessor(full["repetition_penalty"])(
        torch.tensor([prompt_ids]), logits[None].clone()
    )
    scores = TemperatureLogitsWarper(full["temperature"])(None, scores)
    scores = TopKLogitsWarper(full["top_k"])(None, scores)
    expected = TopPLogitsWarper(full["top_p"])(None, scores)[0].softmax(-1)
    count = 4000
    got = Counter(sampler(prompt_ids, seed=seed, **params).choose(logits) for seed in range(count))
    for token, probability in enumerate(expected.tolist()):
        slack = 5 * math.sqrt(count * probability * (1 - probability))
        assert abs(got[token] - count * probability) <= slack, token


@pytest.mark.parametrize("size", [20, SHORT_LISTS[0] // 2, SHORT_LISTS[0] * 3, SHORT_LISTS[1] * 3])
def test_a_nucleus_of_any_length_is_cut_right(size):
    """`size` tokens three times as likely as as many others have 3/4 of everything."""
    weights = torch.full((max(2 * size, 8 * SHORT_LISTS[0]),), 1e-30)
    weights[:size], weights[size : 2 * size] = 3.0, 1.0
    got = choices(weights.log(), 500, temperature=1, top_p=0.7499, seed=3)
    assert 0.9 * size < max(got) < size
    assert min(got) < 0.1 * size
    got = choices(weights.log(), 500, temperature=1, top_p=0.99, seed=3)
    assert 1.5 * size < max(got) < 2 * size


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.5])
def test_a_nucleus_has_at_least_one_token(top_p):
    assert set(choices(torch.tensor([0.0, 4.0, 0.0]), 50, top_p=top_p, seed=1)) == {1}


def test_what_is_impossible_is_never_chosen():
    logits = torch.full((1000,), -math.inf)
    logits[[10, 999]] = 0.0
    assert set(choices(logits, 500, temperature=2.0, seed=1)) == {10, 999}


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    logits = logits_of(VOCAB, scale=1.0)
    first, again, other = (choices(logits, 20, seed=seed) for seed in (7, 7, 8))
    assert first == again != other


def test_without_a_seed_every_request_differs():
    logits = torch.zeros(VOCAB)
    assert choices(logits, 5) != choices(logits, 5)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, 2**64])
def test_any_integer_is_a_seed(seed):
    assert choices(logits_of(), 3, seed=seed) == choices(logits_of(), 3, seed=seed)


def test_generated_tokens_are_penalized_like_those_of_the_prompt():
    logits = torch.tensor([0.0, 2.0, 1.9, 1.8])
    one = sampler([0], temperature=0, repetition_penalty=1.2)
    assert [one.choose(logits) for _ in range(3)] == [1, 2, 3]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30])
def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow(temperature):
    logits = logits_of(scale=100.0)
    assert set(choices(logits, 20, temperature=temperature)) == {int(logits.argmax())}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 5}, {"top_p": 0.5}, EVERYTHING])
def test_logits_that_are_not_finite_are_refused(bad, params):
    logits = logits_of()
    logits[17] = bad
    with pytest.raises(BadLogits):
        sampler(**params).choose(logits)


def test_a_row_in_which_nothing_is_possible_is_refused():
    with pytest.raises(BadLogits):
        sampler().choose(torch.full((10,), -math.inf))


@pytest.mark.parametrize(
    "params",
    [{"temperature": 0}, {}, {"top_p": 0.999999}, {"top_p": 0.5}, {"top_k": 100}, EVERYTHING],
)
@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_no_choice_needs_more_than_six_rows(params, penalty):
    """Four rows of tensors; the other two are for what torch's sort allocates inside."""
    one = sampler(range(VOCAB), **{**params, "repetition_penalty": penalty})
    logits = torch.zeros(VOCAB, dtype=torch.bfloat16)  # all equal: the longest nucleus
    with StorageTracker() as tracker:
        one.choose(logits)
    assert VOCAB * 4 <= tracker.peak <= 4.01 * VOCAB * 4


def test_a_short_nucleus_is_found_without_sorting_everything():
    logits = logits_of(VOCAB, scale=3.0)

    def fastest(**params):
        one, times = sampler(seed=1, **params), []
        for _ in range(5):
            start = time.perf_counter()
            one.choose(logits)
            times.append(time.perf_counter() - start)
        return min(times)

    assert fastest(top_p=0.3) < fastest(top_p=0.999999) / 2
