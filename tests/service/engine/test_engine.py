"""The engine over a real tiny model, and over a scripted runner where time and failure must be controlled."""

import asyncio
import copy
import random
import threading
import time
from contextlib import aclosing

import pytest
import torch

from loader.kv_layout import KvGroup, KvLayout
from service.engine.runner import Runner
from service.engine.single import SingleRunner
from service.engine.types import (
    DeviceLost,
    EngineDead,
    QueueFull,
    Request,
    RequestTooLong,
    SamplingParams,
    StepFailed,
    UnknownToken,
    WaitedTooLong,
)

GREEDY = {"temperature": 0.0}
PROMPTS = 16


def request(ids=(5, 6, 7), name="r", max_tokens=8, **params):
    return Request(name, tuple(ids), SamplingParams(max_tokens=max_tokens, **{**GREEDY, **params}))


async def collect(engine, asked):
    return [event async for event in engine.generate(asked)]


async def collect_all(engine, asked):
    return await asyncio.gather(*(collect(engine, one) for one in asked), return_exceptions=True)


def ids_of(events):
    return [event.token_id for event in events]


def text_of(events):
    return "".join(event.text for event in events)


def prompt(length, seed=0):
    return [random.Random(f"{seed}{i}").randrange(2, 300) for i in range(length)]


def greedy(model, prompts, tokens):
    """What `generate` says, by prompt; those of one length go through it together."""
    answers = {}
    for length in {len(ids) for ids in prompts}:
        batch = torch.tensor([ids for ids in prompts if len(ids) == length])
        with torch.inference_mode():
            output = model.generate(batch, max_new_tokens=tokens, do_sample=False)
        answers |= {
            tuple(ids): new for ids, new in zip(batch.tolist(), output[:, length:].tolist(), strict=True)
        }
    return [answers[tuple(ids)] for ids in prompts]


def paged(model, blocks=120, concurrency=5, reuse=True):
    """A real runner over a copy of the model; blocks of 4 tokens, a group for each window."""
    config, groups = model.config, {}
    window = getattr(config, "sliding_window", None)
    for index in range(config.num_hidden_layers):
        kinds = getattr(config, "layer_types", None)
        sliding = kinds[index] == "sliding_attention" if kinds else window
        groups.setdefault(window if sliding else None, []).append(index)
    layout = KvLayout(4, tuple(KvGroup(window, tuple(x), blocks) for window, x in groups.items()))
    runner = Runner(copy.deepcopy(model), "cpu", 96, concurrency, 24, layout)
    runner.prefix_reuse = reuse
    return runner


def scripted_ids(prompt_tokens, tokens):
    """What the scripted runner likes after a prompt of that length."""
    return [40 + at % 200 for at in range(prompt_tokens, prompt_tokens + tokens)]


# Answers


@pytest.mark.parametrize(
    ("reuse", "blocks"), [(True, 120), (True, 30), (False, 30)], ids=["ample", "preempting", "no-reuse"]
)
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral", "gemma3_text", "qwen3_moe"])
def test_requests_side_by_side_get_the_tokens_of_generate(tiny, engine_over, within, family, reuse, blocks):
    """Prompts of mixed length that begin alike, 8 new tokens each."""
    prompts = [prompt(1 + 7 * i % 50, seed=i % 2) for i in range(PROMPTS)]
    with engine_over(paged(tiny(family), blocks, reuse=reuse), max_queue=PROMPTS) as engine:
        answers = within(collect_all(engine, [request(ids) for ids in prompts]))
        stats = engine.stats()
    assert [ids_of(events) for events in answers] == greedy(tiny(family), prompts, 8)
    # 30 blocks are enough for five that see 13 tokens each.
    assert (stats.preemptions > 0) == (blocks == 30 and family != "mistral")
    assert (stats.prefix_hits > 0) == (stats.prefix_queries > 0) == reuse
    assert stats.kv_blocks_used == 0


def test_a_model_that_runs_one_request_at_a_time_says_what_generate_says(tiny, engine_over, within):
    model, layout = tiny("qwen3_5_text"), KvLayout(96, (KvGroup(None, (0,), 1),))
    prompts = [prompt(length) for length in (7, 20, 1, 40)]
    with engine_over(SingleRunner(model, "cpu", 96, 8, layout)) as engine:
        answers = within(collect_all(engine, [request(ids) for ids in prompts]))
    assert [ids_of(events) for events in answers] == greedy(model, prompts, 8)


def test_text_is_that_of_the_tokens_and_counts_go_up(scripted_runner, tokenizer, engine_over, within):
    with engine_over(scripted_runner(context=96)) as engine:
        events = within(collect(engine, request(prompt(20), max_tokens=40)))
    assert ids_of(events) == scripted_ids(20, 40)
    assert text_of(events) == tokenizer.decode(ids_of(events))
    assert [event.completion_tokens for event in events] == list(range(1, 41))
    assert [event.finish_reason for event in events] == [None] * 39 + ["length"]


def test_tokens_but_the_first_are_told_while_the_next_step_is_computed(
    scripted_runner, engine_over, within, until
):
    """Not before: the event loop would take the interpreter from the thread that prepares the step."""
    came, before = [], []

    class Watching(scripted_runner):
        def step(self, rows, meanwhile):
            time.sleep(0.05)  # the loop is given its chance
            before.append(len(came))
            meanwhile()
            until(lambda: len(came) == len(self.steps), "hearing of the last step's token")
            return super().step(rows)

    async def listen(engine):
        async with aclosing(engine.generate(request(prompt(5), max_tokens=4))) as events:
            async for event in events:
                came.append(event)

    with engine_over(Watching()) as engine:
        within(listen(engine))
    assert before == [0, 1, 1, 2]
    assert len(came) == 4  # the last one too, though no step comes after it


def test_the_last_token_is_told_when_the_only_other_request_leaves_in_that_step(
    scripted_runner, engine_over, within
):
    """Then no step comes that could tell it."""
    both, last, left = threading.Event(), threading.Event(), threading.Event()

    def in_step(rows):
        if len(runner.steps) == 2:
            assert both.wait(20)
        if any(row.start == 40 for row in rows):  # the other one has at most 33 tokens
            last.set()
            assert left.wait(20)

    async def one_leaves(engine):
        leaving = engine.generate(request(prompt(3), max_tokens=30))
        await anext(leaving)
        staying = asyncio.create_task(collect(engine, request(prompt(40), max_tokens=2)))
        await asyncio.sleep(0)  # it is submitted
        both.set()
        assert await asyncio.to_thread(last.wait, 20)
        await leaving.aclose()
        left.set()
        return await staying

    runner = scripted_runner(fail=in_step)
    with engine_over(runner) as engine:
        assert ids_of(within(one_leaves(engine))) == scripted_ids(40, 2)
        assert engine.stats().finished["cancelled"] == 1


@pytest.mark.parametrize("blocks", [120, 24], ids=["ample", "preempting"])
def test_a_seed_gives_the_same_answer_whatever_runs_beside(tiny, engine_over, within, blocks):
    mine = request(prompt(20), max_tokens=30, temperature=1.0, seed=11)
    others = [
        request(prompt(5 * i, seed=i), temperature=1.5, max_tokens=5 + 9 * i, seed=11 * (i % 2))
        for i in range(1, 6)
    ]
    with engine_over(paged(tiny(), blocks, concurrency=3)) as engine:
        alone = ids_of(within(collect(engine, mine)))
        assert ids_of(within(collect_all(engine, [*others[:2], mine, *others[2:]]))[2]) == alone
        assert ids_of(within(collect(engine, request(prompt(20), max_tokens=30, temperature=1.0)))) != alone
        assert (engine.stats().preemptions > 0) == (blocks == 24)


def test_the_beginning_of_a_second_turn_is_not_computed_again(rereading_runner, engine_over, within):
    runner = rereading_runner(context=96, chunk_tokens=64)

    async def two_turns(engine):
        first = await collect(engine, request(prompt(30), max_tokens=10))
        second = request([*prompt(30), *ids_of(first), *prompt(5, seed=1)])
        return first, await collect(engine, second)

    with engine_over(runner) as engine:
        first, second = within(two_turns(engine))
        stats = engine.stats()
    assert {event.cached_tokens for event in first} == {0}
    assert {event.cached_tokens for event in second} == {
        36
    }  # whole blocks of the 39 tokens with keys and values
    assert [(36, 9)] in runner.steps
    assert (stats.prefix_queries, stats.prefix_hits) == (75, 36)


def test_logprobs_go_with_the_tokens_of_those_who_asked(scripted_runner, engine_over, within):
    with engine_over(scripted_runner()) as engine:
        asked, plain = within(collect_all(engine, [request(logprobs=2), request()]))
    assert {event.logprobs for event in plain} == {None}
    for event in asked:
        assert event.logprobs.top[0] == (event.token_id, event.logprobs.chosen)
        assert len(event.logprobs.top) == 2


def test_an_answer_ends_where_the_context_does(scripted_runner, engine_over, within):
    with engine_over(scripted_runner(context=16)) as engine:
        events = within(collect(engine, request(prompt(10), max_tokens=100)))
    assert (len(events), events[-1].finish_reason) == (6, "length")


def test_a_stop_token_ends_and_is_not_shown(scripted_runner, tokenizer, engine_over, within):
    with engine_over(scripted_runner()) as engine:
        events = within(collect(engine, request(prompt(3), stop_token_ids=frozenset({45}))))
        assert engine.stats().finished["stop"] == 1
    assert ids_of(events) == [43, 44, 45]
    assert (text_of(events), events[-1].finish_reason) == (tokenizer.decode([43, 44]), "stop")


def test_a_stop_string_ends_the_request_and_what_was_computed_beyond_it_is_not_given(
    scripted_runner, tokenizer, engine_over, within, until
):
    runner = scripted_runner(context=20_000)
    asked = request(prompt(3), max_tokens=10_000, stop=(tokenizer.decode([46]),))

    async def ask(engine):
        events = await collect(engine, asked)
        await asyncio.to_thread(until, lambda: engine.stats().running == 0)
        return events

    with engine_over(runner) as engine:
        events = within(ask(engine))
        assert engine.stats().finished == {"stop": 1, "length": 0, "cancelled": 0, "error": 0}
        assert engine.stats().kv_blocks_used == 0
    assert ids_of(events) == [43, 44, 45, 46]
    assert (text_of(events), events[-1].finish_reason) == (tokenizer.decode([43, 44, 45]), "stop")


def test_a_long_prompt_is_read_in_chunks_beside_which_others_answer(scripted_runner, engine_over, within):
    runner = scripted_runner(gate_open=False)

    async def both(engine):
        tasks = [asyncio.create_task(collect(engine, request(x))) for x in (prompt(30), prompt(3))]
        await asyncio.sleep(0)
        runner.gate.set()
        return await asyncio.gather(*tasks)

    with engine_over(runner) as engine:
        within(both(engine))
    mixed = [step for step in runner.steps if len(step) == 2 and {1} < {ids for _, ids in step}]
    assert mixed, "a step with a token of the short answer and a part of the long prompt"


# Limits


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(scripted_runner, engine_over, within):
    with engine_over(scripted_runner(context=16)) as engine:
        with pytest.raises(RequestTooLong) as caught:
            within(collect(engine, request(prompt(16))))
        assert (caught.value.prompt_tokens, caught.value.context) == (16, 16)
        assert len(within(collect(engine, request(prompt(15))))) == 1


@pytest.mark.parametrize("token_id", [-1, 300, 2**40])
def test_a_token_that_the_model_does_not_know_is_refused_and_reaches_no_step(
    scripted_runner, engine_over, within, token_id
):
    runner = scripted_runner()
    with engine_over(runner) as engine:
        with pytest.raises(UnknownToken, match="0 to 299") as caught:
            within(collect(engine, request([5, token_id, 6])))
        assert (caught.value.token_id, caught.value.vocab) == (token_id, 300)
        assert runner.steps == []
        assert engine.stats().waiting == 0
        assert len(within(collect(engine, request([0, 299])))) == 8


def test_a_pool_that_does_not_hold_a_context_stops_the_start_and_not_the_thread(scripted_runner, engine_over):
    before = threading.active_count()
    with (
        pytest.raises(ValueError, match=r"group 0 .* has 15 blocks of 4 tokens.* of 64 tokens.* needs 16"),
        engine_over(scripted_runner(context=64, blocks=15)),
    ):
        pass
    assert threading.active_count() == before


def test_a_pool_is_held_against_each_of_its_windows(scripted_runner, engine_over, within):
    runner = scripted_runner(context=64, chunk_tokens=8)
    full, sliding = (
        KvGroup(None, (0,), 16),
        KvGroup(9, (1,), 5),
    )  # 8 tokens before the chunk, in parts of blocks
    runner.layout = KvLayout(4, (full, sliding))
    with engine_over(runner) as engine:
        assert len(within(collect(engine, request(prompt(50), max_tokens=99)))) == 14
    runner.layout = KvLayout(4, (full, KvGroup(9, (1,), 4)))
    with pytest.raises(ValueError, match=r"group 1 .* has 4 blocks .* needs 5"), engine_over(runner):
        pass


@pytest.mark.parametrize("wrong", [{"ids": ()}, {"max_tokens": 0}])
def test_a_request_for_nothing_is_refused(scripted_runner, engine_over, within, wrong):
    with engine_over(scripted_runner()) as engine, pytest.raises(ValueError, match="request r"):
        within(collect(engine, request(**wrong)))


def test_as_many_as_may_wait_wait_and_the_next_is_refused(scripted_runner, engine_over, within):
    runner = scripted_runner(concurrency=2, gate_open=False)

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


def test_an_event_tells_how_long_its_request_waited_for_its_first_step(scripted_runner, engine_over, within):
    runner = scripted_runner(concurrency=1, gate_open=False)

    async def crowd(engine):
        tasks = [asyncio.create_task(collect(engine, request(name=str(i)))) for i in range(2)]
        await asyncio.sleep(0.1)
        runner.gate.set()
        return await asyncio.gather(*tasks)

    with engine_over(runner) as engine:
        first, second = within(crowd(engine))
        total = engine.stats().queue_time.total
    (waited,), (waited_longer,) = ({event.queued_s for event in events} for events in (first, second))
    assert waited < waited_longer
    assert waited_longer > 0.08  # it came a moment after the first
    assert total == pytest.approx(waited + waited_longer)


def test_who_waits_too_long_is_told_so_and_who_runs_goes_on(scripted_runner, engine_over, within, until):
    runner = scripted_runner(concurrency=1, gate_open=False)

    async def crowd(engine):
        tasks = [asyncio.create_task(collect(engine, request(name=str(i)))) for i in range(3)]
        await asyncio.to_thread(until, lambda: runner.steps)
        await asyncio.sleep(0.06)
        runner.gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with engine_over(runner, max_wait_s=0.05) as engine:
        first, *others = within(crowd(engine))
        stats = engine.stats()
        assert len(first) == 8
        assert [type(one) for one in others] == [WaitedTooLong] * 2
        assert all(one.waited_s >= 0.05 and one.retry_after_s >= 1 for one in others)
        assert (stats.timed_out, stats.waiting, stats.running) == (2, 0, 0)
        assert stats.finished == {"stop": 0, "length": 1, "cancelled": 0, "error": 0}
        assert len(within(collect(engine, request()))) == 8


def test_who_had_to_make_room_has_not_waited_too_long(scripted_runner, engine_over, within):
    runner = scripted_runner(concurrency=2, blocks=16, fail=lambda rows: time.sleep(0.002))
    with engine_over(runner, max_wait_s=0.05) as engine:
        answers = within(collect_all(engine, [request(prompt(3), max_tokens=50) for _ in range(2)]))
        assert [ids_of(events) for events in answers] == [scripted_ids(3, 50)] * 2
        assert engine.stats().preemptions > 0


def test_a_finished_answer_frees_its_place_before_its_last_event(scripted_runner, engine_over, within):
    async def one_after_the_other(engine):
        for _ in range(20):
            events = await collect(engine, request())
            assert events[-1].finish_reason == "length"
            assert engine.stats().running == engine.stats().kv_tokens_used == 0

    with engine_over(scripted_runner(concurrency=1), max_queue=0) as engine:
        within(one_after_the_other(engine))


# Leaving


def test_a_client_that_leaves_frees_its_blocks_before_the_next_step(
    scripted_runner, engine_over, within, until
):
    runner = scripted_runner(concurrency=1, context=20_000)

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
        assert engine.stats().kv_blocks_used == engine.stats().kv_tokens_used == 0
        assert len(within(collect(engine, request()))) == 8


def test_a_cancelled_task_aborts_its_request(scripted_runner, engine_over, within, until):
    runner = scripted_runner(gate_open=False)

    async def cancel(engine):
        task = asyncio.create_task(collect(engine, request()))
        await asyncio.to_thread(until, lambda: runner.steps)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        runner.gate.set()

    with engine_over(runner) as engine:
        within(cancel(engine))
        until(lambda: engine.stats().finished["cancelled"] == 1)
        assert engine.stats().running == 0


def test_a_client_that_leaves_the_line_is_never_stepped(scripted_runner, engine_over, within, until):
    runner = scripted_runner(concurrency=1, gate_open=False)

    async def leave_the_line(engine):
        first = asyncio.create_task(collect(engine, request()))
        await asyncio.to_thread(until, lambda: runner.steps)
        second = asyncio.create_task(collect(engine, request(prompt(5))))
        await asyncio.sleep(0.01)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        runner.gate.set()
        await first

    with engine_over(runner) as engine:
        within(leave_the_line(engine))
        until(lambda: engine.stats().finished["cancelled"] == 1)
    assert [(0, 5)] not in runner.steps


def test_a_loop_that_closes_does_not_take_the_engine_with_it(scripted_runner, engine_over, within, until):
    runner = scripted_runner(context=20_000)
    with engine_over(runner) as engine:
        loop = asyncio.new_event_loop()
        events = engine.generate(request((1,), max_tokens=10_000))
        loop.run_until_complete(anext(events))
        loop.close()
        until(lambda: engine.stats().finished["cancelled"] == 1)
        assert engine.stats().running == engine.stats().kv_blocks_used == 0
        assert len(within(collect(engine, request()))) == 8


def test_400_random_visitors_leak_nothing(rereading_runner, engine_over, within, until):
    """Some leave the line, some while their prompt is read, some amid their answer; the pool is too small."""
    chance = random.Random(4)
    runner = rereading_runner(concurrency=6, context=96, chunk_tokens=32, blocks=30)
    places = asyncio.Semaphore(20)
    whole = 0

    async def leave_before_a_token(task):
        begun, wanted = len(runner.steps), chance.randrange(1, 6)
        while not task.done() and len(runner.steps) < begun + wanted:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def visit(engine, i):
        nonlocal whole
        ids = prompt(chance.randrange(1, 40), seed=i % 9)
        asked = request(ids, max_tokens=20, stop=("e",) * (i % 2))
        async with places:
            if i % 4 == 0:
                return await leave_before_a_token(asyncio.create_task(collect(engine, asked)))
            wanted, got = chance.randrange(1, 40), []
            async with aclosing(engine.generate(asked)) as events:
                async for event in events:
                    got.append(event.token_id)
                    if len(got) == wanted:
                        break
            for token_id in got:
                assert token_id == runner.checksum(ids)
                ids.append(token_id)
            whole += event.finish_reason is not None

    async def everyone(engine):
        await asyncio.gather(*(visit(engine, i) for i in range(400)))

    threads = threading.active_count()
    with engine_over(runner) as engine:
        within(everyone(engine))
        until(lambda: engine.stats().running + engine.stats().waiting == 0)
        stats = engine.stats()
        assert stats.kv_tokens_used == stats.kv_blocks_used == 0
        assert sum(stats.finished.values()) == 400
        assert stats.finished["error"] == 0
        assert min(whole, stats.finished["cancelled"], stats.preemptions, stats.prefix_hits) > 0
    assert threading.active_count() == threads


# Failure


def fail_on(length, error):
    """Raise in every step that has a row of so many new ids."""

    def fail(rows):
        if any(len(row.ids) == length for row in rows):
            raise error

    return fail


def fail_times(times, error):
    left = [times]

    def fail(rows):
        if left[0]:
            left[0] -= 1
            raise error

    return fail


def test_a_step_that_fails_loses_its_requests_alone(scripted_runner, engine_over, within):
    runner = scripted_runner(concurrency=2, fail=fail_on(5, ZeroDivisionError("by zero")))

    async def three(engine):
        first = collect(engine, request(prompt(3)))
        second = collect(engine, request(prompt(5)))
        both = await asyncio.gather(first, second, return_exceptions=True)
        return *both, await collect(engine, request(prompt(4)))

    with engine_over(runner) as engine:
        _, failed, last = within(three(engine))
        assert ids_of(last) == scripted_ids(4, 8)
        assert isinstance(failed, StepFailed)
        assert "ZeroDivisionError: by zero" in str(failed)
        assert failed.__cause__ is failed.__context__ is None, "a traceback would keep the step's tensors"
        stats = engine.stats()
        assert (stats.alive, stats.running, stats.kv_blocks_used) == (True, 0, 0)
    assert runner.recovered == 1


def test_those_who_are_not_in_the_step_that_fails_go_on(scripted_runner, engine_over, within):
    runner = scripted_runner(concurrency=1, fail=fail_on(5, ValueError("no")))
    with engine_over(runner) as engine:
        answers = within(collect_all(engine, [request(prompt(n)) for n in (3, 5, 4)]))
        assert [type(answer) for answer in answers] == [list, StepFailed, list]
        assert engine.stats().finished == {"stop": 0, "length": 2, "cancelled": 0, "error": 1}


def test_an_error_keeps_nothing_of_its_step_alive(scripted_runner, engine_over, within):
    import gc
    import weakref

    kept = []

    class Tensor:
        pass

    def fail(rows):
        local = Tensor()
        kept.append(weakref.ref(local))
        raise ValueError("no")

    runner = scripted_runner(fail=fail)
    runner.recover = lambda: kept.append(kept[0]())
    with engine_over(runner) as engine:
        within(collect_all(engine, [request()]))
    gc.collect()
    assert kept[1] is None, "recover() could not have freed it"


def test_a_failing_choice_fails_the_requests_of_its_step(scripted_runner, engine_over, within):
    runner = scripted_runner()
    runner.logits, good = (lambda rows: torch.zeros(len(rows), 0)), runner.logits
    with engine_over(runner) as engine:
        with pytest.raises(StepFailed):
            within(collect(engine, request()))
        runner.logits = good
        assert ids_of(within(collect(engine, request()))) == scripted_ids(3, 8)
        assert engine.stats().kv_blocks_used == 0


def test_logits_that_are_not_finite_fail_their_request_and_no_other(scripted_runner, engine_over, within):
    runner = scripted_runner()
    good = runner.logits

    def bad_for_the_long(rows):
        logits = good(rows)
        logits[[at for at, row in enumerate(rows) if row.start + len(row.ids) > 9]] = torch.nan
        return logits

    runner.logits = bad_for_the_long
    with engine_over(runner) as engine:
        short, long = within(collect_all(engine, [request(prompt(3), max_tokens=6), request(prompt(6))]))
        assert ids_of(short) == scripted_ids(3, 6)
        assert isinstance(long, StepFailed)
        assert "not finite" in str(long)
        assert engine.stats().finished == {"stop": 0, "length": 1, "cancelled": 0, "error": 1}


@pytest.mark.parametrize("chunk", [32, 8], ids=["one chunk", "several"])
def test_nobody_is_given_the_blocks_of_broken_logits(scripted_runner, engine_over, within, chunk):
    runner = scripted_runner(context=32, chunk_tokens=chunk)
    runner.prefix_reuse = True
    runner.logits, good = (lambda rows: torch.full((len(rows), 300), torch.nan)), runner.logits
    with engine_over(runner) as engine:
        with pytest.raises(StepFailed):
            within(collect(engine, request(prompt(20))))
        runner.logits = good
        events = within(collect(engine, request(prompt(20))))
    assert events[0].cached_tokens == 0


def out_of(error):
    raise error


@pytest.mark.parametrize(
    "run_out",
    [
        lambda: out_of(torch.OutOfMemoryError("CUDA out of memory")),
        lambda: out_of(MemoryError()),
        lambda: torch.empty(2**50, dtype=torch.uint8),
    ],
    ids=["GPU", "Python", "CPU"],
)
def test_a_step_without_memory_is_tried_again_with_less(scripted_runner, engine_over, within, run_out):
    def fail(rows):
        if sum(len(row.ids) for row in rows) > 3:
            run_out()

    runner = scripted_runner(concurrency=4, context=32, fail=fail)
    with engine_over(runner) as engine:
        answers = within(collect_all(engine, [request(prompt(n)) for n in (3, 5, 4, 11)]))
        assert [ids_of(events) for events in answers] == [scripted_ids(n, 8) for n in (3, 5, 4, 11)]
        stats = engine.stats()
        assert stats.out_of_memory == runner.recovered > 0
        assert stats.finished["length"] == 4
        assert stats.kv_blocks_used == 0


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma3_text"])
def test_running_out_of_memory_changes_no_token(tiny, engine_over, within, family, reuse):
    """While prompts are read, and when windows have left blocks behind."""
    prompts = [prompt(10 + 5 * i) for i in range(4)]
    runner = paged(tiny(family), reuse=reuse)
    step, count = runner.step, [0]

    def sometimes(rows, meanwhile):
        count[0] += 1
        if count[0] in (2, 12, 30):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(rows, meanwhile)

    runner.step = sometimes
    with engine_over(runner) as engine:
        answers = within(collect_all(engine, [request(ids, max_tokens=40) for ids in prompts]))
        assert engine.stats().out_of_memory == 3
    assert [ids_of(events) for events in answers] == greedy(tiny(family), prompts, 40)


def test_a_cache_that_is_one_state_is_filled_from_its_beginning_again(scripted_runner, engine_over, within):
    length, failures = [0], [torch.OutOfMemoryError("out of memory")] * 2

    def fail(rows):
        (row,) = rows
        length[0] = 0 if row.start == 0 else length[0]
        assert row.start == length[0], "what `SingleRunner` refuses"
        if row.start >= 8 and failures:
            length[0] = None
            raise failures.pop()
        length[0] += len(row.ids)

    runner = scripted_runner(concurrency=1, fail=fail)
    runner.one_state = True
    with engine_over(runner) as engine:
        assert ids_of(within(collect(engine, request(prompt(20))))) == scripted_ids(20, 8)
        assert engine.stats().out_of_memory == 2


def test_who_finds_no_memory_for_the_smallest_step_fails_and_the_next_may_succeed(
    scripted_runner, engine_over, within
):
    runner = scripted_runner(fail=fail_times(5, torch.OutOfMemoryError("out of memory")))
    with engine_over(runner) as engine:
        with pytest.raises(StepFailed, match="out of memory"):
            within(collect(engine, request(prompt(8))))
        assert engine.stats().out_of_memory == 4  # 8 tokens, 4, 2, 1; and 1 for the second time
        assert ids_of(within(collect(engine, request()))) == scripted_ids(3, 8)


async def everyone_at_once(engine, runner, count=6):
    """All are in the inbox before the first step ends, so that nobody is answered before it fails."""
    runner.gate.clear()
    task = asyncio.ensure_future(collect_all(engine, [request(prompt(3 + (i == 1))) for i in range(count)]))
    while engine.stats().waiting + engine.stats().running < count:
        await asyncio.sleep(0.001)
    runner.gate.set()
    return await task


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), GeneratorExit()])
def test_a_thread_that_dies_answers_everyone(scripted_runner, engine_over, within, error):
    runner = scripted_runner(fail=fail_on(4, error))
    with engine_over(runner) as engine:
        answers = within(everyone_at_once(engine, runner))
        assert {type(answer) for answer in answers} == {EngineDead}
        assert len({id(answer) for answer in answers}) == 6, "tracebacks would pile up on one"
        stats = engine.stats()
        assert (stats.alive, stats.running, stats.waiting, stats.kv_tokens_used) == (False, 0, 0, 0)
        assert stats.finished["error"] == 6
        with pytest.raises(EngineDead, match=type(error).__name__):
            within(collect(engine, request()))
    assert runner.closed


def test_a_lost_device_ends_the_engine(scripted_runner, engine_over, within):
    runner = scripted_runner(fail=fail_on(4, RuntimeError("illegal memory access")))

    def lost():
        raise DeviceLost("cuda:0 answers nothing any more")

    runner.recover = lost
    with engine_over(runner) as engine:
        answers = within(everyone_at_once(engine, runner))
        assert {type(answer) for answer in answers} == {EngineDead}
        assert "answers nothing" in str(answers[0])
        assert not engine.stats().alive


def test_closing_answers_those_who_run_and_those_who_wait(scripted_runner, engine_over, within, until):
    runner = scripted_runner(context=20_000)

    async def close_amid(engine):
        asked = [request((1,), max_tokens=10_000) for _ in range(4)]
        tasks = asyncio.gather(*(collect(engine, one) for one in asked), return_exceptions=True)
        await asyncio.to_thread(until, lambda: engine.stats().generation_tokens >= 5)
        await asyncio.to_thread(engine.close)
        return await tasks

    with engine_over(runner, max_queue=4) as engine:
        answers = within(close_amid(engine))
        assert [type(answer) for answer in answers] == [EngineDead] * 4
        engine.close()
        assert not engine.stats().alive
        assert engine.stats().running == engine.stats().waiting == 0
    assert runner.closed


def test_an_engine_that_is_closed_leaves_no_thread(scripted_runner, engine_over, within):
    before = threading.active_count()
    with engine_over(scripted_runner()) as engine:
        within(collect(engine, request()))
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# Statistics


def test_statistics_add_up(scripted_runner, engine_over, within):
    def fail(rows):
        if any(row.ids[0] == 1 for row in rows):  # not by its length: a part of the long prompt may have that
            raise ValueError

    runner = scripted_runner(concurrency=2, fail=fail)

    async def visitors(engine):
        await collect_all(engine, [request(prompt(n), max_tokens=m) for n, m in ((3, 8), (20, 1), (2, 40))])
        await collect_all(engine, [request([1] * 6)])

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
    assert stats.steps == sum(stats.step_time.counts) == sum(stats.batch_size.counts) == len(runner.steps) - 1
    assert stats.batch_size.total == sum(map(len, runner.steps[:-1]))
    assert (stats.context, stats.kv_tokens_total, stats.kv_blocks_total, stats.waiting_limit) == (
        64,
        128,
        32,
        64,
    )


def test_statistics_show_what_runs(scripted_runner, engine_over, within):
    runner = scripted_runner(concurrency=1, context=20_000)

    async def look(engine):
        async with aclosing(engine.generate(request(prompt(20), max_tokens=10_000))) as events:
            for _ in range(3):
                await anext(events)
            return engine.stats()

    with engine_over(runner) as engine:
        stats = within(look(engine))
        assert stats.running == 1
        written = 20 + stats.generation_tokens - 1
        assert written <= stats.kv_tokens_used == 4 * stats.kv_blocks_used < written + 8


def test_an_idle_engine_uses_no_processor_time(scripted_runner, engine_over, within):
    with engine_over(scripted_runner()) as engine:
        within(collect(engine, request()))
        before = time.process_time()
        within(asyncio.sleep(0.3))
        assert time.process_time() - before < 0.1
