"""What the engine is asked for: the request's values over the model's."""

import json

import pytest

from service.api import params
from service.api.errors import ApiError, answer
from service.api.sampling import for_choices, sampling
from service.engine.types import RequestTooLong, SamplingParams
from service.prompt.defaults import GenerationDefaults

ASK = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
VOCABULARY = 100


def sampled(defaults=None, prompt_tokens=10, context=100, **more):
    request = params.parse(json.dumps({**ASK, **more}).encode())
    return sampling(request, defaults or GenerationDefaults(), prompt_tokens, context, VOCABULARY)


def refusal(**more):
    with pytest.raises(ApiError) as refused:
        sampled(**more)
    return answer(refused.value)


def test_a_request_that_says_nothing_is_sampled_as_the_api_does():
    assert sampled() == SamplingParams(max_tokens=90)


def test_the_requests_values_win_over_the_models():
    defaults = GenerationDefaults(0.7, 0.8, 20, 1.05, frozenset({3}))
    ours = sampled(defaults)
    assert (ours.temperature, ours.top_p, ours.top_k, ours.repetition_penalty) == (0.7, 0.8, 20, 1.05)
    assert ours.stop_token_ids == {3}
    theirs = sampled(defaults, temperature=0, top_p=0.5, seed=-(2**63), stop="END")
    assert (theirs.temperature, theirs.top_p, theirs.seed, theirs.stop) == (0, 0.5, -(2**63), ("END",))


def test_a_nucleus_of_nothing_is_greedy():
    assert sampled(temperature=1e-50).temperature == 0, "no division by what is 0 in float32"
    assert sampled(temperature=1e-5).temperature == 1e-5
    assert (sampled(top_p=0).temperature, sampled(top_p=0).top_p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({}, 90),
        ({"max_tokens": 20}, 20),
        ({"max_tokens": 20, "max_completion_tokens": 30}, 30),
        ({"max_tokens": 1000}, 90),
    ],
)
def test_max_tokens_is_what_is_asked_within_what_is_left_of_the_context(more, tokens):
    assert sampled(**more).max_tokens == tokens


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers():
    assert sampled(prompt_tokens=99).max_tokens == 1
    with pytest.raises(RequestTooLong) as refused:
        sampled(prompt_tokens=100)
    told = answer(refused.value)
    assert (told.status, told.code, told.param) == (400, "context_length_exceeded", "messages")
    assert "maximum context length is 100 tokens" in told.message
    assert "100 tokens, which" in told.message


@pytest.mark.parametrize(
    ("name", "models", "theirs"),
    [
        ("top_k", 20, 5), ("min_p", 0.05, 0.5), ("repetition_penalty", 1.05, 1.5),
        ("presence_penalty", 1.5, -1.0), ("frequency_penalty", 0.5, -2.0),
    ],
)  # fmt: skip
def test_a_parameter_that_is_left_out_is_the_models_and_one_that_turns_it_off_is_not(name, models, theirs):
    defaults = GenerationDefaults(**{name: models})
    assert getattr(sampled(defaults), name) == models
    assert getattr(sampled(defaults, **{name: theirs}), name) == theirs
    off = 1 if name == "repetition_penalty" else 0
    assert getattr(sampled(defaults, **{name: off}), name) == off


def test_a_top_k_of_minus_one_is_off_as_at_vllm():
    assert sampled(GenerationDefaults(top_k=20), top_k=-1).top_k == 0


def test_logit_bias_is_by_token_id():
    assert sampled(logit_bias={"5": -100, "99": 0.5}).logit_bias == ((5, -100.0), (99, 0.5))


@pytest.mark.parametrize(
    "key", ["100", "-1", "", "5.0", " 5", "five", "٥", "9" * 5000], ids=lambda key: key[:5] or "empty"
)
def test_a_bias_for_what_is_no_token_is_refused_with_the_ids_there_are(key):
    told = refusal(logit_bias={"3": 1, key: 1})
    assert (told.status, told.code, told.param) == (400, "invalid_value", f"logit_bias.{key[:20]}")
    assert "0 to 99" in told.message
    assert len(told.message) < 200


def test_logprobs_are_off_of_the_chosen_token_or_of_the_likeliest_too():
    asks = ({}, {"logprobs": False}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20})
    assert [sampled(**ask).logprobs for ask in asks] == [None, None, 0, 20]


def test_stop_token_ids_join_the_models_and_ignore_eos_leaves_only_them():
    defaults = GenerationDefaults(stop_token_ids=frozenset({3}))
    assert sampled(defaults, stop_token_ids=[5, 99]).stop_token_ids == {3, 5, 99}
    assert sampled(defaults, ignore_eos=True).stop_token_ids == frozenset()
    assert sampled(defaults, ignore_eos=True, stop_token_ids=[3]).stop_token_ids == {3}
    assert sampled(defaults, ignore_eos=False).stop_token_ids == {3}


def test_a_stop_token_that_is_no_token_is_refused():
    told = refusal(stop_token_ids=[5, 100])
    assert (told.code, told.param) == ("invalid_value", "stop_token_ids.1")
    assert "0 to 99" in told.message


def test_all_tokens_as_stops_are_refused_where_none_may_stop():
    every, defaults = list(range(VOCABULARY)), GenerationDefaults(stop_token_ids=frozenset({0}))
    assert sampled(stop_token_ids=every).stop_token_ids == set(every)
    assert sampled(stop_token_ids=every[1:], min_tokens=1).min_tokens == 1
    told = refusal(defaults=defaults, stop_token_ids=every[1:], min_tokens=1)
    assert (told.status, told.code, told.param) == (400, "invalid_value", "stop_token_ids")
    assert "min_tokens" in told.message


def test_min_tokens_is_never_more_than_the_context_leaves():
    assert sampled(min_tokens=20).min_tokens == 20
    limited = sampled(min_tokens=2000, max_tokens=3000)
    assert (limited.min_tokens, limited.max_tokens) == (90, 90)


def test_every_choice_has_a_seed_of_its_own_and_the_first_the_requests():
    seeds = [one.seed for one in for_choices(sampled(seed=7), 16)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 16
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert seeds == [one.seed for one in for_choices(sampled(seed=7), 16)], "reproducible"
    assert not set(seeds) & {one.seed for one in for_choices(sampled(seed=8), 16)}, "seeds next to each other"


def test_without_a_seed_no_choice_has_one():
    assert [one.seed for one in for_choices(sampled(), 3)] == [None] * 3
