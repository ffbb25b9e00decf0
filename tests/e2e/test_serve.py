"""The real thing: `snugfit serve` as a process, read by the official SDK, with transformers as the oracle.

The model is tiny and random. It computes in float32, where a greedy choice does not depend on how a prompt
is cut into chunks.
"""

import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pynvml
import pytest

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120
NAME, CONTEXT, BUDGET_BYTES = "tiny-qwen2", 4096, 300_000_000
HELLO = [{"role": "user", "content": "Say hello."}]
CONVERSATION = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "你好 😀"},
    {"role": "assistant", "content": "Hello!\n"},
    {"role": "user", "content": "And now?"},
]
LONG = [{"role": "user", "content": "a long story " * 200}]  # more than one chunk of prefill


def text_of(stream):
    return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def test_the_plan_is_printed_before_the_address(server):
    said = server.said()
    assert said.index("300.0 MB") < said.index(f"{NAME} will answer at {server.url}/v1")
    assert [model.id for model in server.client.models.list()] == [NAME]


@pytest.mark.parametrize("messages", [HELLO, CONVERSATION, LONG], ids=["hello", "conversation", "long"])
def test_a_greedy_answer_is_token_for_token_that_of_transformers(server, reference, messages):
    expected = reference.answer(messages, 40)
    assert len(set(expected.split())) > 10, "the model says more than one thing over and over"
    assert server.answer(messages, max_tokens=40) == expected


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "seed": 7}], ids=["greedy", "sampled"])
def test_a_stream_joined_is_the_answer_without_it(server, options):
    assert text_of(server.ask(stream=True, **options)) == server.answer(**options)


def test_without_a_temperature_the_models_own_generation_config_counts(server):
    assert server.answer(temperature=openai.omit) == server.answer(temperature=0)


def test_max_tokens_is_kept_and_told_as_length(server, reference):
    for max_tokens in (1, 5):
        done = server.ask(max_tokens=max_tokens)
        assert done.choices[0].finish_reason == "length"
        assert done.usage.completion_tokens == max_tokens
        assert done.choices[0].message.content == reference.answer(HELLO, max_tokens)


def test_usage_counts_the_tokens_of_the_template_and_of_the_answer(server, reference):
    prompt_tokens = len(reference.ids(CONVERSATION))
    done = server.ask(CONVERSATION, max_tokens=7)
    *_, last = server.ask(CONVERSATION, max_tokens=7, stream=True, stream_options={"include_usage": True})
    for usage in (done.usage, last.usage):
        assert (usage.prompt_tokens, usage.completion_tokens) == (prompt_tokens, 7)
        assert usage.total_tokens == prompt_tokens + 7


def test_a_stop_string_ends_the_answer_before_it(server, reference):
    whole = reference.answer(HELLO, 24)
    stop = whole.split()[5]
    done = server.ask(stop=[stop])
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].message.content == whole[: whole.index(stop)]


def test_at_a_temperature_of_1_a_seed_gives_the_same_answer_and_another_seed_another(server):
    first, again, other = (server.answer(temperature=1, seed=seed) for seed in (7, 7, 8))
    assert first == again
    assert first != other
    assert server.answer(temperature=1) != server.answer(temperature=1), "without a seed it is a fresh one"


def test_clients_at_the_same_time_are_answered_as_each_alone(server, reference):
    """More of them than run at once, so that some wait for a cache that another has used."""
    asked = [[{"role": "user", "content": f"question {i} " * (i + 1)}] for i in range(6)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(server.answer, asked))
    assert answers == [reference.answer(messages, 24) for messages in asked]


def test_a_prompt_that_is_too_long_is_refused_with_both_numbers(server, reference):
    messages = [{"role": "user", "content": "x" * CONTEXT}]
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask(messages)
    assert refused.value.code == "context_length_exceeded"
    assert f"{CONTEXT} tokens" in refused.value.message
    assert f"{len(reference.ids(messages))} tokens" in refused.value.message


def test_the_context_can_be_used_to_the_last_token(server, reference):
    room = 3
    text = "x" * (CONTEXT - room - len(reference.ids([{"role": "user", "content": ""}])))
    done = server.ask([{"role": "user", "content": text}], max_tokens=100)
    assert (done.usage.total_tokens, done.usage.completion_tokens) == (CONTEXT, room)
    assert done.choices[0].finish_reason == "length"


def test_another_model_is_404(server):
    with pytest.raises(openai.NotFoundError) as refused:
        server.ask(model="gpt-4o")
    assert refused.value.code == "model_not_found"


def test_memory_is_shown_as_planned_measured_and_within_the_budget(server):
    found = server.metrics()
    assert found["snugfit_memory_budget_bytes", "cpu"] == BUDGET_BYTES
    assert 0 < found["snugfit_planned_bytes", "cpu"] <= BUDGET_BYTES
    assert 0 < found["snugfit_measured_peak_bytes", "cpu"] <= BUDGET_BYTES
    assert found["snugfit_process_resident_bytes"] > found["snugfit_measured_peak_bytes", "cpu"]
    assert found["snugfit_nvml_up"] == has_driver()


def has_driver():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    pynvml.nvmlShutdown()
    return True


def test_an_answer_is_counted_and_timed(server):
    before = server.metrics()
    done = server.ask(max_tokens=5)
    after = server.metrics()

    def more(name):
        return after[name] - before[name]

    assert more("snugfit_time_to_first_token_seconds_count") == 1
    assert more("snugfit_time_to_first_token_seconds_sum") > 0
    assert more("snugfit_inter_token_latency_seconds_count") == 4
    assert more("snugfit_e2e_request_latency_seconds_count") == 1
    assert more("snugfit_generation_tokens_total") == 5
    assert more("snugfit_prompt_tokens_total") == done.usage.prompt_tokens
    assert more(("snugfit_requests_total", "length")) == 1
    assert after["snugfit_kv_cache_used_tokens"] == 0


def test_a_client_that_leaves_frees_its_cache(server):
    cancelled = ("snugfit_requests_total", "cancelled")
    before = server.metrics()[cancelled]
    stream = server.ask(stream=True, max_tokens=CONTEXT, extra_body={"seed": 1, "temperature": 1})
    next(iter(stream))
    stream.close()
    server._until(lambda: server.metrics()[cancelled] == before + 1)
    assert server.metrics()["snugfit_kv_cache_used_tokens"] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to send")
def test_sigterm_ends_it_with_0_and_without_a_traceback(server):
    """Stands last, since the others need the server."""
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(DEADLINE_S) == 0
    assert "Traceback" not in server.log()
