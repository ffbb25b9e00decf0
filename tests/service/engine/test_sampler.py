import math
import random
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from loader.footprint import SAMPLED_AT_ONCE
from service.engine import sampler as module
from service.engine.ranking import likeliest
from service.engine.sampler import (
    SHORT_LISTS,
    BadLogits,
    Choice,
    Sampler,
    SamplingState,
    features,
)
from service.engine.types import SamplingParams

VOCAB = 151_936
SHORT, LONG = SHORT_LISTS[1][0], SHORT_LISTS[2][0]
EVERYTHING = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.3}
GREEDY = {"temperature": 0.0}


def logits_of(vocab=50, seed=0, scale=3.0, rows=None):
    shape = (vocab,) if rows is None else (rows, vocab)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def state_of(prompt_ids=(), **params):
    return SamplingState(SamplingParams(max_tokens=1, **params), prompt_ids)


def choose(logits, *states):
    """Each state on its own row, all of them with the same logits [vocab]."""
    return Sampler().choose(logits.expand(len(states), -1), states)


def choices(logits, count, **params):
    """One after the other by one request."""
    state = state_of(**params)
    return [choose(logits, state)[0].token_id for _ in range(count)]


def drawn(logits, count, prompt_ids=(), **params):
    """The first of each of `count` requests with other seeds."""
    got = []
    for start in range(0, count, 64):
        seeds = range(start, min(start + 64, count))
        got += choose(logits, *(state_of(prompt_ids, seed=seed, **params) for seed in seeds))
    return [choice.token_id for choice in got]


class StorageTracker(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time; tensors that share a storage count once.
    The storage of `given` does not count."""

    def __init__(self, given):
        super().__init__()
        self.given = given.untyped_storage()._cdata
        self.made, self.peak = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.made = [ref for ref in self.made if ref() is not None]
        storages = [ref().untyped_storage() for ref in self.made]
        sizes = {x._cdata: x.nbytes() for x in storages}
        self.peak = max(self.peak, sum(sizes.values()) - sizes.get(self.given, 0))
        return result


class Calls(TorchDispatchMode):
    """The names of the operations, and the greatest row that each was given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        widths = [x.shape[-1] for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim()]
        self.seen.append((function._schema.name.removeprefix("aten::"), max(widths, default=0)))
        return function(*args, **(kwargs or {}))


# ---- greedy ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 32_000, 50_257, VOCAB])
def test_temperature_0_is_the_argmax_and_of_equal_scores_the_lowest_id(vocab, dtype):
    logits = logits_of(vocab, rows=9).to(dtype)
    logits[1] = 0
    logits[2, -1] = logits[3, 0] = 100
    logits[4, vocab // 3 :] = 50
    expected = logits.float().numpy().argmax(1).tolist()
    for params in ({}, {"logprobs": 0}, {"min_tokens": 1, "stop_token_ids": frozenset({vocab})}):
        states = [state_of(**GREEDY, **params) for _ in range(9)]
        assert [choice.token_id for choice in Sampler().choose(logits, states)] == expected


def test_greedy_rows_without_wishes_are_not_copied():
    logits = torch.zeros(16, VOCAB, dtype=torch.bfloat16)
    with StorageTracker(logits) as tracker:
        Sampler().choose(logits, [state_of(**GREEDY) for _ in range(16)])
    assert tracker.peak < 2 * VOCAB * 4


def test_no_rows_give_no_choices():
    assert Sampler().choose(torch.zeros(0, 10), []) == []


def test_logits_are_left_as_they_were():
    logits = logits_of(rows=3)
    before = logits.clone()
    states = [state_of(seed=1, **EVERYTHING), state_of(logit_bias=((1, 5.0),)), state_of(**GREEDY)]
    Sampler().choose(logits, states)
    assert torch.equal(logits, before)


# ---- distribution ----


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.5},
        {"temperature": 1.7, "top_k": 7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "min_p": 0.1},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.6},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.2},
        EVERYTHING,
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_come_as_often_as_transformers_would_have_it(params, dtype):
    logits, prompt_ids = logits_of(2000).to(dtype), [3, 4, 5, 6, 3]
    full = {"top_k": 2000, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, **params}
    scores = RepetitionPenaltyLogitsProcessor(full["repetition_penalty"])(
        torch.tensor([prompt_ids]), logits[None].float()
    )
    scores = TemperatureLogitsWarper(full["temperature"])(None, scores)
    scores = TopKLogitsWarper(full["top_k"])(None, scores)
    if dtype == torch.float32:  # of equal scores transformers may leave others
        scores = TopPLogitsWarper(full["top_p"])(None, scores)
    elif full["top_p"] < 1:
        scores = nucleus(scores, full["top_p"])
    expected = MinPLogitsWarper(full["min_p"])(None, scores)[0].softmax(-1)
    count = 2000
    got = Counter(drawn(logits, count, prompt_ids, **params))
    for token, probability in enumerate(expected.tolist()):
        slack = 5 * math.sqrt(count * probability * (1 - probability)) + 4 * (probability > 0)
        assert abs(got[token] - count * probability) <= slack, token


def nucleus(scores, top_p):
    """As TopPLogitsWarper, but of equal scores the lower ids stay."""
    values, ids = scores.sort(dim=-1, descending=True, stable=True)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    return torch.full_like(scores, -math.inf).scatter(-1, ids, values.masked_fill(before >= top_p, -math.inf))


def test_tokens_as_likely_as_the_kth_stay_as_in_transformers():
    logits = torch.tensor([0.0, 3.0, 1.0, 1.0, 1.0, 0.5] + [-5.0] * 3000)
    assert set(drawn(logits, 200, top_k=2)) == {1, 2, 3, 4}


def test_the_nucleus_keeps_the_lower_ids_of_equal_tokens():
    logits = torch.full((5000,), -100.0)
    logits[[7, 300, 4000, 4999]] = 2.0
    assert set(drawn(logits, 200, top_p=0.5)) == {7, 300}


@pytest.mark.parametrize("size", [20, SHORT // 2, SHORT * 3, LONG // 2, LONG * 3])
def test_a_nucleus_of_any_length_is_cut_right(size):
    """`size` tokens three times as likely as as many others have 3/4 of everything."""
    weights = torch.full((max(2 * size, 8 * SHORT),), 1e-30)
    weights[:size], weights[size : 2 * size] = 3.0, 1.0
    got = choices(weights.log(), 300, temperature=1, top_p=0.7499, seed=3)
    assert 0.9 * size < max(got) < size
    assert min(got) < 0.1 * size
    got = choices(weights.log(), 300, temperature=1, top_p=0.99, seed=3)
    assert 1.5 * size < max(got) < 2 * size


@pytest.mark.parametrize("top_k", [1, SHORT - 1, SHORT, SHORT + 1, LONG, LONG + 1, VOCAB - 1])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_a_top_k_of_any_size_is_cut_right(top_k, top_p):
    logits = -torch.arange(VOCAB).float() / VOCAB  # nearly equal, and all different
    probabilities = (logits[:top_k].double()).softmax(0)
    kept = int((probabilities.cumsum(0) < top_p - 1e-9).sum()) + 1
    got = drawn(logits, 32, top_k=top_k, top_p=top_p)
    assert max(got) < min(kept, top_k)
    assert len(set(got)) > 1 or top_k == 1


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.5])
def test_a_nucleus_has_at_least_one_token(top_p):
    assert set(choices(torch.tensor([0.0, 4.0, 0.0]), 50, top_p=top_p, seed=1)) == {1}


@pytest.mark.parametrize("params", [{}, {"top_p": 0.99}, {"top_k": 5}, {"min_p": 0.5}])
def test_what_is_impossible_is_never_chosen(params):
    logits = torch.full((1000,), -math.inf)
    logits[[10, 999]] = 0.0
    assert set(choices(logits, 200, temperature=2.0, seed=1, **params)) == {10, 999}


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-300])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_tiny_temperature_is_nearly_greedy_and_does_not_overflow(temperature, params):
    logits = logits_of(scale=100.0)
    assert set(choices(logits, 20, temperature=temperature, **params)) == {int(logits.argmax())}


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("params", [{}, {"top_p": 0.999999}, {"top_k": 30}])
def test_the_greatest_and_the_least_random_number_choose_something_possible(draw, params, monkeypatch):
    monkeypatch.setattr(SamplingState, "draw", lambda _: draw)
    logits = logits_of(1000)
    logits[[0, 1, 500, 998, 999]] = -math.inf
    (choice,) = choose(logits, state_of(**params))
    assert logits[choice.token_id] > -math.inf


# ---- seeds ----


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


@pytest.mark.parametrize("params", [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.2}, {"logprobs": 3}])
def test_each_token_takes_one_random_number(params):
    state, expected = state_of(seed=5, **params), torch.Generator().manual_seed(5)
    for _ in range(3):
        choose(torch.zeros(10_000), state)  # so that every short list is too short
        torch.rand((), generator=expected, dtype=torch.float64)
    assert state.draw() == torch.rand((), generator=expected, dtype=torch.float64).item()


def random_params(rng):
    return {
        "temperature": rng.choice([0.0, 0.3, 1.0, 1.7]),
        "top_k": rng.choice([0, 0, 1, 40, 700]),
        "top_p": rng.choice([1.0, 1.0, 0.5, 0.95]),
        "min_p": rng.choice([0.0, 0.0, 0.05]),
        "repetition_penalty": rng.choice([1.0, 1.0, 1.2]),
        "presence_penalty": rng.choice([0.0, 0.0, 0.6]),
        "frequency_penalty": rng.choice([0.0, 0.0, -0.4]),
        "logit_bias": rng.choice([(), ((3, 2.5), (7, -4.0))]),
        "min_tokens": rng.choice([0, 2]),
        "stop_token_ids": frozenset(rng.sample(range(1000), 3)),
        "logprobs": rng.choice([None, None, 0, 5]),
        "seed": rng.randrange(1000),
    }


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [1000, 50_257])
@pytest.mark.parametrize("at_once", [None, 1, 3, SAMPLED_AT_ONCE], ids=lambda n: f"{n} at once")
def test_a_choice_is_the_same_to_the_bit_alone_and_among_others(vocab, threads, at_once, monkeypatch):
    """`at_once` rows together are what other devices do; the CPU's own way is None."""
    if at_once is not None:
        monkeypatch.setattr(module, "_rows_at_once", lambda logits: at_once)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for mix in range(3):
            rng = random.Random(mix)
            rows = rng.randint(2, 12)
            logits = logits_of(vocab, seed=mix, scale=rng.choice([0.5, 3.0]), rows=rows).bfloat16()
            params = [random_params(rng) for _ in range(rows)]
            prompts = [rng.sample(range(vocab), 50) for _ in range(rows)]
            together = [state_of(prompt, **p) for prompt, p in zip(prompts, params, strict=True)]
            alone = [state_of(prompt, **p) for prompt, p in zip(prompts, params, strict=True)]
            for _ in range(3):
                got = Sampler().choose(logits, together)
                for row, choice in enumerate(got):
                    assert Sampler().choose(logits[row : row + 1], [alone[row]]) == [choice]
    finally:
        torch.set_num_threads(before)


# ---- penalties, bias, min_tokens ----


def test_generated_tokens_are_penalized_like_those_of_the_prompt():
    logits = torch.tensor([0.0, 2.0, 1.9, 1.8])
    state = state_of([0], temperature=0, repetition_penalty=1.2)
    assert [choose(logits, state)[0].token_id for _ in range(3)] == [1, 2, 3]


def test_presence_counts_the_answers_tokens_once_and_frequency_each_time():
    logits = torch.tensor([2.0, 1.0, 0.0])
    assert choices(logits, 5, temperature=0, presence_penalty=1.5) == [0, 1, 0, 0, 0]
    assert choices(logits, 5, temperature=0, frequency_penalty=0.6) == [0, 0, 1, 0, 1]


def test_presence_and_frequency_leave_the_prompt_alone():
    logits = torch.tensor([2.0, 1.0])
    for params in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        assert choose(logits, state_of([0] * 9, temperature=0, **params))[0].token_id == 0


def test_penalties_come_after_the_bias_in_the_order_that_types_gives():
    logits = torch.tensor([1.0, -1.0, 0.0, 0.0])
    state = state_of(
        [0, 1], temperature=0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5,
        logit_bias=((0, 3.0), (1, -1.0), (0, 1.0)), logprobs=4,
    )  # fmt: skip
    assert choose(logits, state)[0].logprobs == nearly([2.5, -4.0, 0.0, 0.0], 0)
    assert choose(logits, state)[0].logprobs == nearly([1.75, -4.0, 0.0, 0.0], 0)
    assert choose(logits, state)[0].logprobs == nearly([1.25, -4.0, 0.0, 0.0], 0)


def nearly(scores, chosen):
    """Equal to Logprobs of all of these scores, nearly."""
    logprobs = torch.tensor(scores).double().log_softmax(0).tolist()
    order = sorted(range(len(scores)), key=lambda token: (-scores[token], token))

    class Nearly:
        def __eq__(self, other):
            assert [token for token, _ in other.top] == order
            assert [value for _, value in other.top] == pytest.approx([logprobs[x] for x in order], abs=1e-6)
            return other.chosen == pytest.approx(logprobs[chosen], abs=1e-6)

    return Nearly()


def test_many_tokens_are_penalized_as_few_are():
    logits, prompt_ids = logits_of(20_000), list(range(0, 20_000, 2))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([prompt_ids]), logits[None].clone())[0]
    state = state_of(prompt_ids, temperature=0, repetition_penalty=1.3)
    scores = logits.clone()
    state.adjust(scores)
    assert torch.equal(scores, expected)


def test_an_answer_of_many_different_tokens_is_penalized_whole():
    scores, state = torch.zeros(500), state_of(frequency_penalty=1.0)
    for token_id in [*range(400), 7]:
        state.record(token_id)
    state.adjust(scores)
    assert scores.tolist() == [-1.0] * 7 + [-2.0] + [-1.0] * 392 + [0.0] * 100


def test_a_stop_token_cannot_be_chosen_before_min_tokens():
    logits = torch.tensor([5.0, 4.0, 3.0])
    params = {"min_tokens": 2, "stop_token_ids": frozenset({0, 1})}
    assert choices(logits, 4, temperature=0, **params) == [2, 2, 0, 0]
    assert choices(logits, 2, seed=1, **params) == [2, 2]


def test_ids_beyond_the_vocabulary_are_ignored():
    params = {"logit_bias": ((1, 9.0), (10**6, 9.0), (-1, 9.0)), "min_tokens": 5}
    stops = frozenset({0, 10**6, -1})
    assert choices(torch.zeros(4), 2, temperature=0, stop_token_ids=stops, **params) == [1, 1]


def test_where_every_token_would_end_the_answer_one_of_them_is_chosen():
    params = {"min_tokens": 5, "stop_token_ids": frozenset(range(4)), "logprobs": 0}
    (choice,) = choose(torch.tensor([0.0, 2.0, 1.0, 0.0]), state_of(temperature=0, **params))
    assert choice.token_id == 1
    assert math.isfinite(choice.logprobs.chosen)
    assert set(choices(torch.zeros(4), 50, seed=1, **params)) == {0, 1, 2, 3}


def test_token_ids_are_not_looked_at_again_in_each_step(monkeypatch):
    """`tensor` is what makes one of a list: a thousand ids would hold up every other row of the step."""
    stops = frozenset(range(100, 1100))
    state = state_of(logit_bias=tuple((i, 1.0) for i in range(1000)), min_tokens=9, stop_token_ids=stops)
    monkeypatch.setattr(torch, "tensor", None)
    scores = torch.zeros(2000)
    for _ in range(2):
        scores.zero_()
        state.adjust(scores)
        assert scores.tolist() == [1.0] * 100 + [-math.inf] * 1000 + [0.0] * 900


# ---- logprobs ----


def test_everything_is_sorted_as_torch_would():
    values = logits_of(5000, rows=2).bfloat16().float()
    values[0, 7], values[1, ::3] = -math.inf, 0.0
    for got, expected in zip(
        likeliest(values, 5000), values.sort(dim=1, descending=True, stable=True), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("params", [GREEDY, {}, {"temperature": 0.5, "top_k": 3}, {"top_p": 0.5}])
@pytest.mark.parametrize("shown", [0, 1, 5, SHORT + 5])
def test_logprobs_are_of_the_scores_before_temperature_and_cuts(params, shown):
    logits = logits_of(20_000).bfloat16()
    expected = logits.float().log_softmax(0)
    values, ids = expected.sort(descending=True, stable=True)
    (choice,) = choose(logits, state_of(seed=2, logprobs=shown, **params))
    assert choice.logprobs.chosen == pytest.approx(float(expected[choice.token_id]), abs=1e-5)
    assert [token for token, _ in choice.logprobs.top] == ids[:shown].tolist()
    assert [value for _, value in choice.logprobs.top] == pytest.approx(values[:shown].tolist(), abs=1e-5)


def test_the_chosen_token_has_the_same_logprob_among_the_likeliest():
    (choice,) = choose(logits_of(), state_of(seed=2, logprobs=50))
    assert dict(choice.logprobs.top)[choice.token_id] == choice.logprobs.chosen


@pytest.mark.parametrize("logits", [torch.zeros(20_000), torch.tensor([0.0, -0.0]).repeat(10_000)])
def test_of_equal_tokens_those_with_the_lower_ids_are_shown(logits):
    (choice,) = choose(logits, state_of(**GREEDY, logprobs=4))
    assert [token for token, _ in choice.logprobs.top] == [0, 1, 2, 3]


def test_more_likeliest_tokens_than_there_are_is_all_of_them():
    (choice,) = choose(torch.tensor([0.0, 1.0]), state_of(**GREEDY, logprobs=20))
    assert [token for token, _ in choice.logprobs.top] == [1, 0]


def test_who_wants_no_logprobs_gets_none_beside_one_who_does():
    got = choose(logits_of(), state_of(**GREEDY), state_of(**GREEDY, logprobs=2), state_of(logprobs=0))
    assert [None if choice.logprobs is None else len(choice.logprobs.top) for choice in got] == [None, 2, 0]


# ---- what cannot be chosen ----


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize(
    "params",
    [GREEDY, {**GREEDY, "logprobs": 3}, {}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, EVERYTHING],
)
@pytest.mark.parametrize("vocab", [50, 9000])
def test_logits_that_are_not_finite_are_refused_and_neighbours_are_served(bad, params, vocab):
    logits = logits_of(vocab, rows=3)
    expected = [choose(logits[row], state_of(seed=1, **params))[0] for row in range(3)]
    logits[1, 17] = bad
    got = Sampler().choose(logits, [state_of(seed=1, **params) for _ in range(3)])
    assert isinstance(got[1], BadLogits)
    assert not math.isfinite(got[1].value)
    assert [got[0], got[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("params", [GREEDY, {}, {"top_k": 5}, EVERYTHING])
def test_a_row_in_which_nothing_is_possible_is_refused(params):
    (got,) = choose(torch.full((10,), -math.inf), state_of(**params))
    assert isinstance(got, BadLogits)


# ---- memory and work ----

COSTLY = [
    {},
    GREEDY,
    {"top_p": 0.999999},
    {"top_p": 0.5, "min_p": 0.1},
    {"top_k": 100},
    {"top_k": LONG + 1},
    {"logprobs": 20},
    EVERYTHING,
]


@pytest.mark.parametrize("params", COSTLY)
@pytest.mark.parametrize("penalties", [{}, {"repetition_penalty": 1.5, "frequency_penalty": 0.1}])
@pytest.mark.parametrize("spread", [0.0, 3.0])
def test_one_choice_needs_no_more_than_six_rows(params, penalties, spread):
    """Equal logits have the longest nucleus. What torch's sort needs inside is not seen: two rows."""
    state = state_of(range(VOCAB), **{**params, **penalties})
    logits = (logits_of(VOCAB) * spread).bfloat16()[None]
    with StorageTracker(logits) as tracker:
        Sampler().choose(logits, [state])
    assert VOCAB * 4 * (params != GREEDY or penalties != {}) <= tracker.peak <= 5.3 * VOCAB * 4


@pytest.mark.parametrize(("rows", "vocab"), [(64, 1000), (10, 32_000)])
@pytest.mark.parametrize("at_once", [1, SAMPLED_AT_ONCE])
@pytest.mark.parametrize("params", COSTLY)
def test_many_choices_need_no_more_than_six_rows_for_each_of_eight(params, rows, at_once, vocab, monkeypatch):
    monkeypatch.setattr(module, "_rows_at_once", lambda logits: at_once)
    states = [state_of(range(vocab), **{"repetition_penalty": 1.1, **params}) for _ in range(rows)]
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16)
    with StorageTracker(logits) as tracker:
        Sampler().choose(logits, states)
    assert tracker.peak <= 8 * 6 * vocab * 4


def test_the_rehearsal_needs_as_much_as_any_choice():
    logits = torch.zeros(1, VOCAB, dtype=torch.bfloat16)

    def peak(states):
        with StorageTracker(logits) as tracker:
            Sampler().choose(logits, states)
        return tracker.peak

    costliest = max(peak([state_of(range(VOCAB), **params)]) for params in COSTLY)
    assert peak(features(1, range(VOCAB))) >= 0.99 * costliest  # less the one segment of a free choice


def test_a_short_nucleus_is_found_without_sorting_everything():
    logits = logits_of(VOCAB)
    logits[1000] = 25.0

    def sorted_widths(**params):
        with Calls() as calls:
            choose(logits, state_of(seed=1, **params))
        names = ("sort", "topk", "bitwise_left_shift_")  # with the last, numbers for numpy's sort are made
        return [width for name, width in calls.seen if name in names]

    assert max(sorted_widths(top_p=0.3)) < VOCAB // 16
    assert max(sorted_widths(top_k=50, top_p=0.999)) < VOCAB // 16
    assert max(sorted_widths(top_p=0.999999)) == VOCAB
    assert sorted_widths() == sorted_widths(temperature=0.0) == []


@pytest.mark.parametrize("params", [GREEDY, {}, {"top_k": 50, "top_p": 0.9}, {"logprobs": 5, "min_p": 0.1}])
def test_all_rows_come_to_the_host_together(params, monkeypatch):
    """`tolist` and `item` are what would wait for a device."""
    waits, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(1) or tolist(tensor))
    monkeypatch.setattr(SamplingState, "draw", lambda _: 0.5)
    logits = logits_of(VOCAB, rows=4)
    with Calls() as calls:
        got = Sampler().choose(logits, [state_of([1, 2], **params) for _ in range(4)])
    assert all(isinstance(choice, Choice) for choice in got)
    assert len(waits) == 1
    assert not {"_local_scalar_dense", "nonzero"} & {name for name, _ in calls.seen}
