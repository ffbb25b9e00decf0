"""The scripted engine keeps the contract of the real one, since others are tested against it."""

import asyncio
from contextlib import aclosing

import pytest

from service.engine.fake import FakeEngine
from service.engine.types import (
    EngineDead,
    Logprobs,
    QueueFull,
    Request,
    RequestTooLong,
    SamplingParams,
    StepFailed,
)


def request(name="r", prompt_ids=(1, 2, 3), max_tokens=100, **params):
    return Request(name, prompt_ids, SamplingParams(max_tokens=max_tokens, **params))


async def collect(engine, asked):
    return [event async for event in engine.generate(asked)]


def text_of(events):
    return "".join(event.text for event in events)


def test_it_says_its_pieces_a_token_each(within):
    engine = FakeEngine(["Hel", "lo"])
    events = within(collect(engine, request()))
    assert [event.text for event in events] == ["Hel", "lo"]
    assert [event.completion_tokens for event in events] == [1, 2]
    assert [event.finish_reason for event in events] == [None, "stop"]
    assert [asked.id for asked in engine.requests] == ["r"]


def test_it_honours_max_tokens_and_stop_strings(within):
    engine = FakeEngine(["one ", "two#", "#", " three"])
    cut = within(collect(engine, request(max_tokens=1)))
    stopped = within(collect(engine, request(stop=("##",))))
    assert (text_of(cut), cut[-1].finish_reason) == ("one ", "length")
    assert (text_of(stopped), stopped[-1].finish_reason, len(stopped)) == ("one two", "stop", 3)


def test_it_fails_after_as_many_tokens_as_it_is_told(within):
    async def listen(engine, heard):
        async for event in engine.generate(request()):
            heard.append(event.text)

    heard = []
    with pytest.raises(StepFailed):
        within(listen(FakeEngine("abc", fail_after=2), heard))
    assert heard == ["a", "b"]


def test_it_refuses_when_full_when_dead_and_what_is_too_long(within):
    with pytest.raises(EngineDead):
        within(collect(FakeEngine("a", dead=True), request()))
    with pytest.raises(RequestTooLong):
        within(collect(FakeEngine("a", context=3), request()))
    with pytest.raises(QueueFull):
        within(collect(FakeEngine("a", concurrency=0, queue_limit=0), request()))


def test_held_requests_wait_until_they_are_released_or_the_engine_dies(within):
    async def hold(end):
        engine = FakeEngine("ab", held=True)
        task = asyncio.create_task(collect(engine, request()))
        while not engine.stats().running:
            await asyncio.sleep(0)
        end(engine)
        return await task

    assert text_of(within(hold(FakeEngine.release))) == "ab"
    with pytest.raises(EngineDead):
        within(hold(FakeEngine.die))


def test_those_beyond_its_concurrency_wait_in_line(within):
    async def crowd():
        engine = FakeEngine("ab", concurrency=1, held=True)
        tasks = [asyncio.create_task(collect(engine, request(str(i)))) for i in range(3)]
        while len(engine.requests) < 3:
            await asyncio.sleep(0)
        seen = engine.stats()
        engine.release()
        await asyncio.gather(*tasks)
        return seen, engine.stats()

    during, after = within(crowd())
    assert (during.running, during.waiting) == (1, 2)
    assert (after.running, after.waiting, after.finished["stop"]) == (0, 0, 3)


def test_it_notes_who_left(within):
    async def leave(engine):
        async with aclosing(engine.generate(request("gone"))) as events:
            await anext(events)

    engine = FakeEngine("abc")
    within(leave(engine))
    assert engine.aborted == ["gone"]
    assert engine.stats().finished["cancelled"] == 1
    assert engine.stats().running == 0


def test_closing_twice_is_closing(within):
    engine = FakeEngine("a")
    engine.close()
    engine.close()
    assert not engine.stats().alive


def test_it_gives_the_logprobs_that_were_asked_for(within):
    scripted = [Logprobs(-1.0, ((0, -1.0), (5, -2.0))), Logprobs(-3.0)]
    engine = FakeEngine("abc", logprobs=scripted)
    plain = within(collect(engine, request()))
    asked = within(collect(engine, request(logprobs=1)))
    assert {event.logprobs for event in plain} == {None}
    assert [event.logprobs for event in asked] == [Logprobs(-1.0, ((0, -1.0),)), *[Logprobs(-3.0)] * 2]


def test_it_says_how_much_of_the_prompt_was_there_and_never_all_of_it(within):
    engine = FakeEngine("ab", cached_tokens=4)
    assert {event.cached_tokens for event in within(collect(engine, request(prompt_ids=range(6))))} == {4}
    assert {event.cached_tokens for event in within(collect(engine, request(prompt_ids=range(3))))} == {2}


def test_a_burst_comes_without_waiting_between(within):
    async def turns_of_the_loop(engine):
        turns = 0

        async def count():
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count())
        seen = []
        async for _ in engine.generate(request()):
            seen.append(turns)
        counting.cancel()
        return seen

    one, two, three, four, five = within(turns_of_the_loop(FakeEngine("abcde", burst=2)))
    assert one == two < three == four < five


def test_until_min_tokens_stop_strings_are_text(within):
    events = within(collect(FakeEngine("a#b#c"), request(stop=("#",), min_tokens=2)))
    assert (text_of(events), events[-1].finish_reason) == ("a#b", "stop")
