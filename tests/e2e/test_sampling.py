"""Sampling parameters through the SDK, on a real model, with transformers' own numbers as the oracle."""

import openai
import pytest
import torch

HELLO = [{"role": "user", "content": "Say hello."}]


def words(reference, ids):
    return [reference.tokenizer.decode([token_id]) for token_id in ids]


def said(choice):
    """The tokens of an answer, as its logprobs name them."""
    return [entry.token for entry in choice.logprobs.content]


@torch.inference_mode()
def greedy(reference, messages, count):
    """transformers' own choice, as ids."""
    ids = reference.ids(messages)
    return reference.model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[
        0, len(ids) :
    ].tolist()


@torch.inference_mode()
def logprobs_of(reference, messages, text_ids):
    """[tokens, vocab]: transformers' log-probabilities at each token of an answer."""
    ids = reference.ids(messages)
    logits = reference.model(torch.tensor([ids + text_ids])).logits[0, len(ids) - 1 : -1]
    return torch.log_softmax(logits.float(), -1)


def test_logprobs_are_those_of_transformers(server, reference):
    choice = server.ask(max_tokens=12, logprobs=True, top_logprobs=5).choices[0]
    assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
    ids = greedy(reference, HELLO, 12)
    assert said(choice) == words(reference, ids)
    expected = logprobs_of(reference, HELLO, ids)
    for entry, row in zip(choice.logprobs.content, expected, strict=True):
        assert entry.logprob == pytest.approx(float(row.max()), abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(
            row.topk(5).values.tolist(), abs=1e-3
        )
        assert "\ufffd" in entry.token or bytes(entry.bytes) == entry.token.encode()


def test_a_stream_has_the_same_logprobs(server):
    options = {"max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    whole = server.ask(**options).choices[0].logprobs.content
    chunks = [chunk.choices[0] for chunk in server.ask(stream=True, **options)]
    streamed = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
    assert streamed == whole


def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_forbids_it(server, reference):
    (first,) = greedy(reference, HELLO, 1)
    forced = server.ask(max_tokens=3, logprobs=True, logit_bias={"77": 100}).choices[0]
    assert said(forced) == words(reference, [77, 77, 77])
    other = server.ask(max_tokens=1, logprobs=True, logit_bias={str(first): -100}).choices[0]
    assert said(other) != words(reference, [first])


def penalized(reference, presence=0.0, frequency=0.0, bias=0.0, tokens=10):
    """A greedy answer by transformers' logits, with OpenAI's formula for the penalties; 77 is biased."""
    chosen = []
    for _ in range(tokens):
        logits = logprobs_of(reference, HELLO, [*chosen, 0])[-1].clone()
        logits[77] += bias
        for token_id in set(chosen):
            logits[token_id] -= presence + frequency * chosen.count(token_id)
        chosen.append(int(logits.argmax()))
    return chosen


@pytest.mark.parametrize("penalty", ["presence", "frequency"])
def test_penalties_are_openais(server, reference, penalty):
    first = logprobs_of(reference, HELLO, [0])[0]
    bias = float(first.max() - first[77]) + 3  # so that 77 is chosen again and again without a penalty
    expected = penalized(reference, bias=bias, **{penalty: 2.0})
    assert expected != penalized(reference, bias=bias)
    options = {"logit_bias": {"77": bias}, f"{penalty}_penalty": 2}
    choice = server.ask(max_tokens=10, logprobs=True, **options).choices[0]
    assert said(choice) == words(reference, expected)


def test_stop_token_ids_end_and_min_tokens_puts_that_off(server, reference):
    ids = greedy(reference, HELLO, 12)
    at = next(i for i in range(2, 12) if ids[i] not in ids[:i])
    stop = {"stop_token_ids": [ids[at]]}
    done = server.ask(max_tokens=12, extra_body=stop)
    assert (done.choices[0].finish_reason, done.usage.completion_tokens) == ("stop", at + 1)
    later = server.ask(max_tokens=12, extra_body={**stop, "min_tokens": at + 2})
    assert later.usage.completion_tokens > at + 1


def test_ignore_eos_goes_on_to_max_tokens(server, reference):
    end = str(reference.tokenizer.eos_token_id)
    done = server.ask(max_tokens=4, logit_bias={end: 100})
    assert (done.choices[0].finish_reason, done.usage.completion_tokens) == ("stop", 1)
    on = server.ask(max_tokens=4, logit_bias={end: 100}, extra_body={"ignore_eos": True})
    assert (on.choices[0].finish_reason, on.usage.completion_tokens) == ("length", 4)


@pytest.mark.parametrize(
    "more", [{"top_p": 1e-6}, {"extra_body": {"top_k": 1}}, {"extra_body": {"min_p": 1.0}}]
)
def test_what_leaves_only_the_likeliest_is_greedy(server, more):
    assert server.answer(temperature=1.5, **more) == server.answer()


def test_several_answers_differ_and_a_seed_gives_them_again(server):
    def texts(**more):
        done = server.ask(n=3, temperature=1, seed=3, **more)
        assert [choice.index for choice in done.choices] == [0, 1, 2]
        return [choice.message.content for choice in done.choices], done.usage

    (first, usage), (second, _) = texts(), texts()
    assert first == second
    assert len(set(first)) == 3
    assert usage.completion_tokens == 3 * 24
    streamed = ["", "", ""]
    for chunk in server.ask(n=3, temperature=1, seed=3, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == first


def test_a_second_turn_does_not_read_the_first_again(server):
    history = [{"role": "user", "content": "one more long story " * 30}]
    first = server.ask(history)
    history += [{"role": "assistant", "content": first.choices[0].message.content}]
    second = server.ask([*history, {"role": "user", "content": "And then?"}])
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert first.usage.prompt_tokens // 32 * 32 <= cached < second.usage.prompt_tokens


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"n": 99}, "n"),
        ({"extra_body": {"repetition_penalty": 1e-39}}, "repetition_penalty"),
        ({"extra_body": {"stop_token_ids": list(range(2000))}}, "stop_token_ids"),
    ],
)
def test_a_wrong_parameter_is_named(server, more, param):
    with pytest.raises(openai.BadRequestError) as caught:
        server.ask(**more)
    assert param in caught.value.param
