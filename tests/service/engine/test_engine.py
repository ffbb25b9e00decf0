"""The engine over a real tiny model, and over a scripted runner where time and failure must be controlled."""

import asyncio
import random
import threading
from contextlib import aclosing

import pytest
import torch

from service.engine.runner import Runner
from service.engine.types import (
    DeviceLost,
    EngineDead,
    QueueFull,
    Request,
    RequestTooLong,
    SamplingParams,
    StepFailed,
)

GREEDY = {"temperature": 0.0}


def request(ids=(5, 6, 7), name="r", max_tokens=8, **params):
    return Request(name, tuple(ids), SamplingParams(max_tokens=max_tokens, **{**GREEDY, **params}))


async def collect(engine, asked):
    return [event async for event in engine.generate(asked)]


def ids_of(events):
    return [event.token_id for event in events]


def prompt(length, seed=0):
    return [random.Random(f"{seed}{i}").randrange(2, 300) for i in range(length)]


class ScriptedRunner:
    """Always likes token 40 + slot best. Steps only while `gate` is open; `fail(slot, ids)` may raise."""

    def __init__(self, concurrency=2, context=64, chunk_tokens=8, gate_open=True, fail=None):
        self.concurrency, self.context, self.chunk_tokens = concurrency, context, chunk_tokens
        self.gate, self.fail = threading.Event(), fail or (lambda slot, ids: None)
        self.steps, self.released, self.closed = [], [], False
        self.check_device = lambda: None
        if gate_open:
            self.gate.set()

    def step(self, slot, ids):
        self.steps.append((slot, len(ids)))
        assert self.gate.wait(20)
        self.fail(slot, ids)
        logits = torch.zeros(300)
        logits[40 + slot] = 1
        return logits

    def release(self, slot):
        self.released.append(slot)

    def close(self):
        self.closed = True


# Answers


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3_5_text"])
def test_requests_side_by_side_get_the_tokens_of_generate(tiny, engine_over, within, family):
    model = tiny(family)
    prompts = [prompt(length, seed=length) for length in (1, 7, 20, 33, 50)]

    async def all_at_once(engine):
        return await asyncio.gather(*(collect(engine, request(ids, max_tokens=24)) for ids in prompts))

    with engine_over(Runner(model, "cpu", 96, 3, 8)) as engine:
        answers = within(all_at_once(engine))
    for ids, events in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            expected = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False)
        assert ids_of(events) == expected[0, len(ids) :].tolist()


def test_text_is_that_of_the_tokens_and_counts_go_up(tiny, tokenizer, engine_over, within):
    with engine_over(Runner(tiny(), "cpu", 96, 1, 8)) as engine:
        events = within(collect(engine, request(prompt(20), max_tokens=40)))
    assert "".join(event.text for event in events) == tokenizer.decode(ids_of(events))
    assert [event.completion_tokens for event in events] == list(range(1, 41))
    assert [event.finish_reason for event in events] == [None] * 39 + ["length"]


def test_a_seed_gives_the_same_answer_whatever_runs_beside(tiny, engine_over, within):
    mine = request(prompt(20), max_tokens=30, temperature=1.0, seed=11)

    async def beside_others(engine):
        others = [
            request(prompt(5 * i, seed=i), temperature=1.5, max_tokens=5 + 9 * i, seed=11 * (i % 2))
            for i in range(1, 6)
        ]
        return (await asyncio.gather(*(collect(engine, x) for x in [*others[:2], mine, *others[2:]])))[2]

    with engine_over(Runner(tiny(), "cpu", 96, 3, 8)) as engine:
        alone = ids_of(within(collect(engine, mine)))
        assert ids_of(within(beside_others(engine))) == alone
        assert ids_of(within(collect(engine, request(prompt(20), max_tokens=30, temperature=1.0)))) != alone


def test_an_answer_ends_where_the_context_does(engine_over, within):
    with engine_over(ScriptedRunner(context=16)) as engine:
        events = within(collect(engine, request(prompt(10), max_tokens=100)))
    assert (len(events), events[-1].finish_reason) == (6, "length")


def test_a_long_prompt_is_read_in_chunks_between_which_others_step(engine_over, within, until):
    runner = ScriptedRunner(gate_open=False)

    async def both(engine):
        tasks = [asyncio.create_task(collect(engine, request(x))) for x in (prompt(20), prompt(3))]
        await asyncio.sleep(0)
        runner.gate.set()
        return await asyncio.gather(*tasks)

    with engine_over(runner) as engine:
        within(both(engine))
    assert [step for step in runner.steps if step[0] == 0][:4] == [(0, 8), (0, 8), (0, 4), (0, 1)]
    assert runner.steps.index((1, 3)) < runner.steps.index((1, 1)) < runner.steps.index((0, 4))


# Limits


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(engine_over, within):
    with engine_over(ScriptedRunner(context=16)) as engine:
        with pytest.raises(RequestTooLong) as caught:
            within(collect(engine, request(prompt(16))))
        assert (caught.value.prompt_tokens, caught.value.context) == (16, 16)
        assert len(within(collect(engine, request(prompt(15))))) == 1


@pytest.mark.parametrize("wrong", [{"ids": ()}, {"max_tokens": 0}])
def test_a_request_for_nothing_is_refused(engine_over, within, wrong):
    with engine_over(ScriptedRunner()) as engine, pytest.raises(ValueError, match="request r"):
        within(collect(engine, request(**wrong)))


def test_as_many_as_may_wait_wait_and_the_next_is_refused(engine_over, within):
    runner = ScriptedRunner(concurrency=2, gate_open=False)

    async def crowd(engine):
        tasks = [asyncio.create_task(collect(engine, request(name=str(i)))) for i in range(7)]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        runner.gate.set()
        return tasks.index(done.pop()), await asyncio.gather(*tasks, return_exceptions=True)

    with engine_over(runner, max_queue=4) as engine:
        refused, answers = within(crowd(engine))
        assert refused == 6
        assert isinstance(answers[6], QueueFull)
        assert (answers[6].limit, answers[6].retry_after_s) == (4, 1)
        assert [len(events) for events in answers[:6]] == [8] * 6
        assert engine.stats().rejected == 1


def test_a_finished_answer_frees_its_place_before_its_last_event(engine_over, within):
    async def one_after_the_other(engine):
        for _ in range(20):
            events = await collect(engine, request())
            assert events[-1].finish_reason == "length"
            assert engine.stats().running == engine.stats().kv_tokens_used == 0

    with engine_over(ScriptedRunner(concurrency=1), max_queue=0) as engine:
        within(one_after_the_other(engine))


# Leaving


def test_a_client_that_leaves_frees_its_slot_before_the_next_step(engine_over, within, until):
    runner = ScriptedRunner(concurrency=1, context=20_000)

    async def leave(engine):
        async with aclosing(engine.generate(request(max_tokens=10_000, ids=(1,)))) as events:
            await anext(events)
            runner.gate.clear()
            count = len(runner.steps)
        runner.gate.set()
        return count

    with engine_over(runner) as engine:
        begun = within(leave(engine))
        until(lambda: engine.stats().finished["cancelled"] == 1)
        assert len(runner.steps) <= begun + 2
        assert runner.released == [0]
        assert engine.stats().kv_tokens_used == 0
        assert len(within(collect(engine, request()))) == 8


def test_a_cancelled_task_aborts_its_request(engine_over, within, until):
    runner = ScriptedRunner(gate_open=False)

    async def cancel(engine):
        task = asyncio.create_task(collect(engine, request()))
        while not runner.steps:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        runner.gate.set()

    with engine_over(runner) as engine:
        within(cancel(engine))
        until(lambda: engine.stats().finished["cancelled"] == 1)
        assert engine.stats().running == 0


def test_a_client_that_leaves_the_line_is_never_stepped(engine_over, within, until):
    runner = ScriptedRunner(concurrency=1, gate_open=False)

    async def leave_the_line(engine):
        first = asyncio.create_task(collect(engine, request()))
        while not runner.steps:
            await asyncio.sleep(0.001)
        second = asyncio.create_task(collect(engine, request(prompt(5))))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        runner.gate.set()
        await first

    with engine_over(runner) as engine:
        within(leave_the_line(engine))
        until(lambda: engine.stats().finished["cancelled"] == 1)
    assert (0, 5) not in runner.steps


def test_a_loop_that_closes_does_not_take_the_engine_with_it(engine_over, within, until):
    runner = ScriptedRunner(context=20_000)
    with engine_over(runner) as engine:
        loop = asyncio.new_event_loop()
        events = engine.generate(request((1,), max_tokens=10_000))
        loop.run_until_complete(anext(events))
        loop.close()
        until(lambda: engine.stats().finished["cancelled"] == 1)
        assert engine.stats().running == 0
        assert len(within(collect(engine, request()))) == 8


def test_200_random_aborts_leak_nothing(tiny, engine_over, within, until):
    chance = random.Random(4)

    started = 0

    async def visit(engine, i):
        nonlocal started
        asked = request(prompt(chance.randrange(1, 40), seed=i), max_tokens=20)
        try:
            async with asyncio.timeout(chance.random() * 0.1), aclosing(engine.generate(asked)) as events:
                started += 1
                for _ in range(chance.randrange(1, 12)):
                    await anext(events)
        except TimeoutError:
            pass

    async def everyone(engine):
        await asyncio.gather(*(visit(engine, i) for i in range(200)))

    ids = prompt(30)
    with engine_over(Runner(tiny(), "cpu", 96, 3, 8), max_queue=300) as engine:
        before = within(collect(engine, request(ids, max_tokens=20)))
        within(everyone(engine))
        until(lambda: engine.stats().running + engine.stats().waiting == 0)
        stats = engine.stats()
        assert stats.kv_tokens_used == 0
        assert engine._slots.free == 3
        assert sum(stats.finished.values()) == started + 1
        assert stats.finished["cancelled"] > 100
        assert within(collect(engine, request(ids, max_tokens=20))) == before


# Failure


def fail_on(length, error):
    def fail(slot, ids):
        if len(ids) == length:
            raise error

    return fail


def test_a_step_that_fails_loses_that_request_alone(engine_over, within):
    runner = ScriptedRunner(fail=fail_on(5, ZeroDivisionError("by zero")))

    async def three(engine):
        asked = [request(prompt(n)) for n in (3, 5, 4)]
        return await asyncio.gather(*(collect(engine, x) for x in asked), return_exceptions=True)

    with engine_over(runner) as engine:
        first, failed, last = within(three(engine))
        assert len(first) == len(last) == 8
        assert isinstance(failed, StepFailed)
        assert "ZeroDivisionError: by zero" in str(failed)
        assert failed.__cause__ is failed.__context__ is None, "a traceback would keep the step's tensors"
        assert engine.stats().finished["error"] == 1
        assert engine.stats().alive


def test_logits_that_are_not_finite_fail_their_request(engine_over, within):
    runner = ScriptedRunner()
    runner.step = lambda slot, ids: torch.full((300,), torch.nan)
    with engine_over(runner) as engine, pytest.raises(StepFailed, match="not finite"):
        within(collect(engine, request()))


async def everyone_at_once(engine, count=6):
    return await asyncio.gather(
        *(collect(engine, request(prompt(3 + (i == 1)))) for i in range(count)), return_exceptions=True
    )


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_a_thread_that_dies_answers_everyone(engine_over, within, error):
    runner = ScriptedRunner(fail=fail_on(4, error))
    with engine_over(runner) as engine:
        answers = within(everyone_at_once(engine))
        assert {type(answer) for answer in answers} == {EngineDead}
        stats = engine.stats()
        assert (stats.alive, stats.running, stats.waiting, stats.kv_tokens_used) == (False, 0, 0, 0)
        assert stats.finished["error"] == 6
        with pytest.raises(EngineDead, match=type(error).__name__):
            within(collect(engine, request()))
    assert runner.closed


def test_a_lost_device_ends_the_engine_even_when_nothing_can_be_released(engine_over, within):
    runner = ScriptedRunner(fail=fail_on(4, RuntimeError("illegal memory access")))

    def lost(*_args):
        raise DeviceLost("cuda:0 answers nothing any more")

    runner.check_device = runner.release = lost
    with engine_over(runner) as engine:
        answers = within(everyone_at_once(engine))
        assert {type(answer) for answer in answers} == {EngineDead}
        assert not engine.stats().alive


def test_closing_answers_those_who_run_and_those_who_wait(engine_over, within):
    runner = ScriptedRunner(context=20_000)

    async def close_amid(engine):
        tasks = [asyncio.create_task(collect(engine, request((1,), max_tokens=10_000))) for _ in range(4)]
        while engine.stats().generation_tokens < 5:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(engine.close)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with engine_over(runner, max_queue=4) as engine:
        answers = within(close_amid(engine))
        assert [type(answer) for answer in answers] == [EngineDead] * 4
        engine.close()
        assert not engine.stats().alive
    assert runner.closed


# Statistics


def test_statistics_add_up(engine_over, within):
    runner = ScriptedRunner(concurrency=2, fail=fail_on(5, ValueError()))

    async def visitors(engine):
        asked = [request(prompt(n), max_tokens=m) for n, m in ((3, 8), (20, 1), (5, 4), (2, 40))]
        await asyncio.gather(*(collect(engine, x) for x in asked), return_exceptions=True)

    with engine_over(runner) as engine:
        within(visitors(engine))
        stats = engine.stats()
    assert stats.finished == {"stop": 0, "length": 3, "cancelled": 0, "error": 1}
    assert (stats.prompt_tokens, stats.generation_tokens) == (25, 49)
    assert sum(stats.time_to_first_token.counts) == 3
    assert sum(stats.inter_token_latency.counts) == 49 - 3
    assert sum(stats.e2e_latency.counts) == 3
    assert sum(stats.queue_time.counts) == 4
    assert stats.e2e_latency.total >= stats.inter_token_latency.total / 2 > 0
    assert (stats.context, stats.kv_tokens_total, stats.waiting_limit) == (64, 128, 64)


def test_statistics_show_what_runs(engine_over, within, until):
    runner = ScriptedRunner(concurrency=1, context=20_000)

    async def look(engine):
        async with aclosing(engine.generate(request(prompt(20), max_tokens=10_000))) as events:
            for _ in range(3):
                await anext(events)
            return engine.stats()

    with engine_over(runner) as engine:
        stats = within(look(engine))
        assert stats.running == 1
        assert 22 <= stats.kv_tokens_used == 20 + stats.generation_tokens - 1


def test_an_idle_engine_uses_no_processor_time(engine_over, within):
    import time

    with engine_over(ScriptedRunner()) as engine:
        within(collect(engine, request()))
        before = time.process_time()
        within(asyncio.sleep(0.3))
        assert time.process_time() - before < 0.1
