from zlib import crc32

import pytest

from loader.kv_layout import KvGroup, KvLayout
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.types import Request, SamplingParams

BLOCK = 4


def scheduler(blocks=1000, concurrency=8, chunk=64, window=None, **more):
    layout = KvLayout(BLOCK, (KvGroup(window, (0,), blocks),))
    return Scheduler(layout, concurrency, chunk, **more)


def sequence(name, prompt, arrived=0.0):
    """`prompt`: a number of tokens that nobody else has, or the tokens."""
    if isinstance(prompt, int):
        prompt = [crc32(name.encode()) + place for place in range(prompt)]
    return Sequence(Request(name, tuple(prompt), SamplingParams(max_tokens=99)), None, None, arrived=arrived)


def added(engine, **prompts):
    """Sequences of that many tokens, added in this order."""
    made = [sequence(name, prompt) for name, prompt in prompts.items()]
    for one in made:
        engine.add(one)
    return made


def finish(engine, step):
    """A successful forward that chooses token 7 for each row that wants one."""
    engine.finish(step)
    for scheduled in step.rows:
        if scheduled.row.sample:
            scheduled.sequence.tokens.append(7)
    return step


def go(engine, steps=1):
    for _ in range(steps):
        step = finish(engine, engine.schedule())
    return step


def shares(step):
    """How many tokens each sequence computes in the step, in the order of its rows."""
    return {scheduled.sequence.request.id: len(scheduled.row.ids) for scheduled in step.rows}


def names(sequences):
    return "".join(one.request.id for one in sequences)


def test_a_prompt_is_read_and_then_a_token_is_computed_in_each_step():
    engine = scheduler()
    (a,) = added(engine, a=10)
    step = engine.schedule()
    (scheduled,) = step.rows
    assert (step.admitted, step.preempted, scheduled.sequence) == ((a,), (), a)
    assert (list(scheduled.row.ids), scheduled.row.start, scheduled.row.sample) == (a.tokens, 0, True)
    assert a.computed == 0
    finish(engine, step)
    assert (a.computed, a.pending) == (10, 1)
    (scheduled,) = engine.schedule().rows
    assert (list(scheduled.row.ids), scheduled.row.start, scheduled.row.sample) == ([7], 10, True)


def test_a_long_prompt_is_read_in_chunks_and_only_the_last_wants_logits():
    engine = scheduler(chunk=8)
    added(engine, a=20)
    rows = [go(engine).rows[0].row for _ in range(3)]
    assert [(row.start, len(row.ids), row.sample) for row in rows] == [
        (0, 8, False), (8, 8, False), (16, 4, True),
    ]  # fmt: skip


def test_first_come_first_served_while_there_are_rows():
    engine = scheduler(concurrency=2)
    a, b, c, d = added(engine, a=5, b=5, c=5, d=5)
    assert engine.schedule().admitted == (a, b)
    assert (engine.running, engine.waiting, list(engine)) == (2, 2, [a, b, c, d])
    assert [one.running for one in (a, b, c, d)] == [True, True, False, False]
    assert engine.schedule().admitted == ()
    engine.remove(a)
    assert engine.schedule().admitted == (c,)


def test_all_who_decode_come_first_and_prompts_get_what_is_left():
    engine = scheduler(chunk=16)
    added(engine, a=4, b=4)
    go(engine)
    added(engine, c=40)
    assert shares(engine.schedule()) == {"a": 1, "b": 1, "c": 14}


def test_while_others_decode_a_step_reads_few_tokens():
    engine = scheduler(chunk=64, mixed_tokens=10)
    (a,) = added(engine, a=50)
    assert shares(go(engine)) == {"a": 50}
    added(engine, b=50)
    assert shares(go(engine)) == {"a": 1, "b": 10}
    engine.remove(a)
    assert shares(go(engine)) == {"b": 40}


def test_short_prompts_start_in_the_same_step_as_a_long_one_before_them():
    engine = scheduler(chunk=64)
    added(engine, a=1000, b=10, c=10)
    assert shares(engine.schedule()) == {"a": 44, "b": 10, "c": 10}


def test_a_long_prompt_alone_gets_the_whole_step():
    engine = scheduler(chunk=64)
    added(engine, a=1000)
    assert shares(go(engine)) == {"a": 64}


def test_a_long_prompt_reads_at_least_half_of_each_step_whatever_comes_behind_it():
    engine = scheduler(chunk=64, concurrency=100)
    (a,) = added(engine, a=320)
    for number in range(10):
        added(engine, **{f"{number}-{place}": 8 for place in range(10)})
        step = go(engine)
        read = {name: share for name, share in shares(step).items() if share > 1}
        assert a.computed == 320 or read["a"] * 2 >= sum(read.values())
        for scheduled in step.rows:
            if scheduled.row.sample and scheduled.sequence is not a:
                engine.remove(scheduled.sequence)
    assert a.generated > 0


def test_a_short_prompt_overtakes_long_ones_that_only_wait_for_their_turn_to_be_read():
    engine = scheduler(chunk=64)
    a, b, c, d = added(engine, a=320, b=320, c=320, d=10)
    step = engine.schedule()
    assert step.admitted == (a, d)
    assert shares(step) == {"a": 54, "d": 10}
    assert list(engine) == [a, d, b, c]


def test_nobody_overtakes_one_that_waits_for_blocks():
    engine = scheduler(blocks=20)
    added(engine, a=40)
    go(engine)
    b, c = added(engine, b=40, c=4)
    assert engine.schedule().admitted == ()
    engine.remove(b)
    assert engine.schedule().admitted == (c,)


def test_long_prompts_are_read_one_after_the_other():
    engine = scheduler(chunk=64)
    a, b, _ = added(engine, a=128, b=128, c=128)
    go(engine, 2)
    assert (a.generated, b.computed) == (1, 0)
    go(engine, 3)
    assert b.generated >= 1


def test_a_sequence_starts_when_blocks_for_its_prompt_are_there_and_one_stays():
    engine = scheduler(blocks=12)
    (a,) = added(engine, a=16)
    go(engine)
    (b,) = added(engine, b=25)  # 7 blocks; 4 are held, and one has to stay
    go(engine)  # a takes a fifth block
    assert not b.running
    engine.remove(b)
    (c,) = added(engine, c=24)
    assert go(engine).admitted == (c,)
    assert a.preemptions == c.preemptions == 0


def test_one_alone_may_fill_the_pool():
    engine = scheduler(blocks=5)
    (a,) = added(engine, a=17)
    assert go(engine).admitted == (a,)
    go(engine, 3)
    assert a.computed == 20
    assert engine.pool.blocks_used == 5


def test_when_blocks_run_out_the_youngest_gives_its_own_back_and_waits_in_front():
    engine = scheduler(blocks=9, concurrency=3, prefix_reuse=False)
    a, b, c, d = added(engine, a=8, b=8, c=8, d=8)
    assert go(engine).admitted == (a, b, c)
    step = engine.schedule()  # each needs a third block
    assert shares(step) == {"a": 1, "b": 1, "c": 1}
    finish(engine, step)
    go(engine, 3)
    step = engine.schedule()
    assert step.preempted == (c,)
    assert shares(step) == {"a": 1, "b": 1}
    assert (c.computed, c.running, c.preemptions) == (0, False, 1)
    assert list(engine) == [a, b, c, d]
    assert step.admitted == ()


def test_a_preempted_sequence_computes_all_its_tokens_again_and_goes_on():
    engine = scheduler(blocks=6, prefix_reuse=False)
    a, b = added(engine, a=8, b=8)
    go(engine, 5)
    step = go(engine)
    assert step.preempted == (b,)
    engine.remove(a)
    step = engine.schedule()
    assert step.admitted == (b,)
    assert shares(step) == {"b": len(b.tokens)}
    assert step.rows[0].row.sample
    assert b.cached == 0


def test_a_preempted_sequence_finds_its_own_blocks_again():
    engine = scheduler(blocks=8)
    a, b = added(engine, a=8, b=12)
    go(engine)
    while not b.preemptions:
        go(engine)
    engine.remove(a)
    step = engine.schedule()
    assert step.admitted == (b,)
    assert step.rows[0].row.start == 12
    assert b.cached == 0  # that is what the client is told: of the prompt, at first


def test_the_youngest_waits_with_its_blocks_while_older_ones_leave_it_none():
    engine = scheduler(blocks=7, prefix_reuse=False)
    a, b = added(engine, a=8, b=12)
    go(engine)
    assert go(engine).preempted == ()
    assert engine.pool.blocks_used == 7
    b.tokens.extend([7] * 3)  # as if it had come further
    b.computed += 3
    assert shares(engine.schedule()) == {"a": 1}
    assert (b.running, b.preemptions) == (True, 0)
    engine.remove(a)
    assert shares(engine.schedule()) == {"b": 1}


def test_an_older_prompt_takes_the_blocks_of_a_younger_answer():
    engine = scheduler(blocks=10, chunk=16, prefix_reuse=False)
    _, b = added(engine, a=40, b=4)
    assert shares(go(engine)) == {"a": 12, "b": 4}
    assert shares(go(engine)) == {"b": 1, "a": 15}
    assert shares(go(engine)) == {"b": 1, "a": 5}  # all that there are blocks for
    step = engine.schedule()
    assert (step.preempted, shares(step)) == ((b,), {"a": 8})
    assert finish(engine, step).rows[0].row.sample


def test_the_prefix_of_another_is_not_computed_again():
    engine = scheduler()
    (a,) = added(engine, a=range(20))
    go(engine)
    (b,) = added(engine, b=[*range(18), 99, 98])
    step = engine.schedule()
    row = step.rows[-1].row
    assert (b.cached, b.computed, row.start, list(row.ids)) == (16, 16, 16, [16, 17, 99, 98])
    assert row.tables[0][:4] == step.rows[0].row.tables[0][:4]
    assert a.cached == 0


def test_the_second_turn_of_a_chat_finds_the_first_with_its_answer():
    engine = scheduler()
    (a,) = added(engine, a=10)
    go(engine, 15)
    engine.remove(a)
    assert engine.pool.blocks_used == 0
    (b,) = added(engine, b=[*a.tokens, 1, 2, 3])
    engine.schedule()
    assert len(a.tokens) == 25
    assert b.cached == 24


def test_a_failed_step_can_be_tried_again_and_leaves_nothing_to_find():
    engine = scheduler()
    (a,) = added(engine, a=20)
    engine.forget(engine.schedule())
    (b,) = added(engine, b=list(a.tokens))
    step = engine.schedule()
    assert (a.computed, b.cached) == (0, 0)
    assert shares(step) == {"a": 20, "b": 20}
    finish(engine, step)
    assert engine.pool.blocks_used == 10


def test_where_an_error_leaves_nothing_all_tokens_are_computed_again():
    engine = Scheduler(KvLayout(BLOCK, (KvGroup(None, (0,), 10),)), 1, 8, prefix_reuse=False)
    (a,) = added(engine, a=20)
    go(engine, 2)
    engine.restart(engine.schedule())
    assert (a.computed, a.running, engine.pool.blocks_used) == (0, True, 0)
    assert [(row.start, len(row.ids)) for row in (go(engine).rows[0].row for _ in range(4))] == [
        (0, 8), (8, 8), (16, 4), (20, 1),
    ]  # fmt: skip
    assert engine.pool.blocks_used == 6


@pytest.mark.parametrize("reuse", [True, False])
def test_after_a_failed_step_windows_go_on_where_they_were(reuse):
    engine = scheduler(blocks=12, window=8, chunk=16, prefix_reuse=reuse)
    (a,) = added(engine, a=60)
    go(engine, 2)
    step = engine.schedule()
    before = [list(table) for table in step.rows[0].row.tables]
    engine.forget(step)
    (scheduled,) = engine.schedule().rows
    assert (a.computed, scheduled.row.start, len(scheduled.row.ids)) == (32, 32, 16)
    assert [list(table) for table in scheduled.row.tables] == before


def test_what_one_has_computed_that_broke_is_not_found():
    engine = scheduler(chunk=8)
    (a,) = added(engine, a=20)
    go(engine, 2)
    engine.remove(a, broken=True)
    (b,) = added(engine, b=list(a.tokens))
    engine.schedule()
    assert b.cached == 0


def test_those_of_a_failed_step_can_leave():
    engine = scheduler()
    added(engine, a=20, b=30)
    step = engine.schedule()
    for scheduled in step.rows:
        engine.remove(scheduled.sequence)
    engine.forget(step)
    assert engine.idle
    assert engine.pool.blocks_used == 0


def test_one_can_leave_while_its_step_is_computed():
    engine = scheduler()
    a, b = added(engine, a=20, b=30)
    step = engine.schedule()
    engine.remove(a)
    engine.finish(step)
    assert (a.computed, b.computed, list(engine)) == (0, 30, [b])


def test_a_smaller_step_after_out_of_memory_and_larger_ones_again_after_a_while():
    engine = scheduler(chunk=64)
    (a,) = added(engine, a=3000)
    engine.forget(engine.schedule())
    assert engine.shrink()
    assert shares(engine.schedule()) == {"a": 32}
    assert engine.shrink()
    sizes = [shares(go(engine))["a"] for _ in range(40)]
    assert sizes == [16] * 16 + [32] * 16 + [64] * 8
    assert a.computed == sum(sizes)


def test_shrinking_begins_with_what_the_last_step_had_and_ends_when_one_token_fails_twice():
    engine = scheduler(chunk=1000)
    added(engine, a=8)
    sizes = []
    while True:
        sizes.append(sum(shares(engine.schedule()).values()))
        if not engine.shrink():
            break
    assert sizes == [8, 4, 2, 1, 1]
    assert shares(go(engine)) == {"a": 1}
    engine.schedule()
    assert engine.shrink(), "after a success, a step of one token gets a second try again"


def test_a_step_of_one_token_has_a_second_try_after_a_larger_one_has_failed():
    engine = scheduler(chunk=64)
    added(engine, a=1)
    engine.schedule()
    assert engine.shrink(), "the second try"
    added(engine, b=2)
    assert shares(engine.schedule()) == {"a": 1, "b": 2}
    assert engine.shrink()
    assert shares(engine.schedule()) == {"a": 1}
    assert [engine.shrink(), engine.shrink()] == [True, False]


def test_nothing_is_left_to_shrink_before_the_first_step():
    assert not scheduler().shrink()


def test_those_who_decode_take_turns_when_a_step_is_too_small_for_all():
    engine = scheduler()
    sequences = added(engine, a=4, b=4, c=4, d=4, e=4)
    go(engine)
    engine.schedule()
    engine.shrink()
    assert [list(shares(go(engine))) for _ in range(3)] == [["a", "b"], ["c", "d"], ["e", "a"]]
    go(engine, 2)
    assert [one.generated for one in sequences] == [3, 3, 3, 3, 3]


def test_overdue_are_those_who_came_before_and_never_started():
    engine = scheduler(blocks=6, concurrency=2, prefix_reuse=False)
    for name, arrived in (("a", 1.0), ("b", 2.0), ("c", 3.0), ("d", 4.0)):
        engine.add(sequence(name, 8, arrived))
    while not (preempted := go(engine).preempted):
        pass
    assert names(preempted) == "b"
    assert names(engine.overdue(4.0)) == "c"
    assert names(engine.overdue(9.0)) == "cd"


def test_leaving_gives_the_blocks_back_and_keeps_the_line():
    engine = scheduler(concurrency=1)
    a, b, c = added(engine, a=5, b=5, c=5)
    go(engine)
    engine.remove(b)
    engine.remove(a)
    assert engine.pool.blocks_used == 0
    assert not a.running
    assert engine.schedule().admitted == (c,)


def test_one_cannot_leave_twice():
    engine = scheduler()
    a, b = added(engine, a=5, b=5)
    go(engine)
    engine.remove(a)
    with pytest.raises(KeyError):
        engine.remove(a)
    assert list(engine) == [b]


def test_idle_means_that_nobody_runs_or_waits():
    engine = scheduler()
    assert engine.idle
    assert engine.schedule().rows == ()
    (a,) = added(engine, a=5)
    assert not engine.idle
    go(engine)
    assert not engine.idle
    engine.remove(a)
    assert engine.idle


def test_a_pool_too_small_for_one_alone_is_an_error_and_no_endless_loop():
    engine = scheduler(blocks=2)
    added(engine, a=9)
    with pytest.raises(RuntimeError, match="9 tokens"):
        engine.schedule()
    engine = scheduler(blocks=2)
    added(engine, a=8)
    go(engine)
    with pytest.raises(RuntimeError, match="9 tokens"):
        engine.schedule()


def test_one_row_at_a_time_for_a_runner_with_a_cache_of_another_kind():
    engine = Scheduler(KvLayout(4096, (KvGroup(None, (0,), 1),)), 1, 32, prefix_reuse=False)
    a, b = added(engine, a=40, b=4)
    assert [shares(go(engine)) for _ in range(3)] == [{"a": 32}, {"a": 8}, {"a": 1}]
    engine.remove(a)
    assert go(engine).admitted == (b,)


def test_a_sliding_window_serves_an_answer_much_longer_than_its_blocks():
    engine = scheduler(blocks=7, window=8, chunk=16)
    (a,) = added(engine, a=100)
    go(engine, 100)
    assert len(a.tokens) == 100 + 94
    assert engine.pool.blocks_used <= 3
