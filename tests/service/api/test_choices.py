"""Several answers to one request: n requests in the engine and one to the client."""

import asyncio
import json
from contextlib import aclosing

import httpx
import pytest

from service.api.choices import together
from service.engine.types import QueueFull, StepFailed, TokenEvent

FULL = QueueFull(1, 1, 2.5)


def event(at, last=3, cached=0):
    return TokenEvent(f"{at} ", at, at, "stop" if at == last else None, cached_tokens=cached)


class Answers:
    """Generators for `together`. `log` is what happened to them, by index: "begun", "closed"."""

    def __init__(self, *scripts):
        self.log = []
        self.generators = [self._run(index, script) for index, script in enumerate(scripts)]

    async def _run(self, index, script):
        self.log.append((index, "begun"))
        try:
            for item in script:
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    await asyncio.sleep(3600)
                if isinstance(item, float):
                    await asyncio.sleep(item)
                else:
                    yield item
        finally:
            self.log.append((index, "closed"))


async def collected(generators):
    async with aclosing(together(generators)) as batches:
        return [came async for came in batches]


def test_what_is_ready_comes_together_and_in_order():
    answers = Answers([event(1), event(2), event(3)], [event(3)])
    came, _ = asyncio.run(collected(answers.generators))
    assert came == [(0, event(1)), (0, event(2)), (0, event(3))]


def test_what_is_not_ready_is_not_waited_for():
    answers = Answers([event(1), 0.01, event(2), event(3)], [0.05, event(3)])
    assert [len(came) for came in asyncio.run(collected(answers.generators))] == [1, 2, 1]


def test_an_only_answer_comes_event_by_event():
    answers = Answers([event(1), 0.01, event(2), event(3)])
    came = asyncio.run(collected(answers.generators))
    assert came == [[(0, event(1))], [(0, event(2))], [(0, event(3))]]


def test_the_others_begin_when_the_first_has_a_token():
    answers = Answers([0.01, event(1), event(3)], [event(3)], [event(3)])

    async def watched():
        async with aclosing(together(answers.generators)) as batches:
            waiting = asyncio.ensure_future(anext(batches))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert answers.log == [(0, "begun")]
            seen = [await waiting, *[came async for came in batches]]
        return [each for came in seen for each in came]

    assert sorted(index for index, _ in asyncio.run(watched())) == [0, 0, 1, 2]


def test_others_follow_also_where_the_first_is_over_at_once():
    answers = Answers([event(3)], [event(3)])
    assert sum(map(len, asyncio.run(collected(answers.generators)))) == 2


def test_a_queue_that_does_not_take_all_refuses_before_anything_was_given_out():
    answers = Answers([event(1), None], [None], [FULL])

    async def asked():
        with pytest.raises(QueueFull):
            await anext(together(answers.generators))

    asyncio.run(asked())
    assert {(0, "closed"), (1, "closed"), (2, "closed")} <= set(answers.log)


def test_an_error_of_one_comes_after_what_was_there_and_ends_the_others():
    answers = Answers([event(1), None], [0.01, event(1), StepFailed("lost")])

    async def asked():
        batches = together(answers.generators)
        seen = await anext(batches) + await anext(batches)
        with pytest.raises(StepFailed):
            await anext(batches)
        return seen

    assert asyncio.run(asked()) == [(0, event(1)), (1, event(1))]
    assert {(0, "closed"), (1, "closed")} <= set(answers.log)


def test_closing_closes_all_before_it_returns():
    answers = Answers([event(1), None], [None])

    async def left():
        async with aclosing(together(answers.generators)) as batches:
            await anext(batches)
            assert (0, "closed") not in answers.log
        assert {(0, "closed"), (1, "closed")} <= set(answers.log)

    asyncio.run(left())


def test_an_answer_without_a_reason_is_an_error():
    for script in ([], [event(1)]):
        with pytest.raises(StepFailed, match="without a reason"):
            asyncio.run(collected(Answers(script).generators))


@pytest.fixture
def counting(scripted):
    """Answers the i-th request with i + 2 tokens, and tells of 10 * i cached ones."""

    class Counting(scripted):
        def __init__(self, hold_at=None, fails=None):
            super().__init__(hold_at=hold_at)
            self.fails = fails

        async def generate(self, request):
            index = len(self.requests)
            self.requests.append(request)
            self.running += 1
            if self.fails and index == self.fails[0]:
                self.running -= 1
                raise self.fails[1]
            try:
                for at in range(1, index + 3):
                    await asyncio.sleep(0.005)
                    await self._hold(at)
                    yield event(at, last=index + 2, cached=10 * index)
            except GeneratorExit:
                self.aborted.append(request.id)
                raise
            except asyncio.CancelledError:
                self.aborted.append(request.id)
                raise
            finally:
                self.running -= 1

    return Counting


def test_n_answers_are_n_requests_with_one_prompt_and_seeds_of_their_own(running, counting):
    with running(counting()) as live:
        completion = live.client().chat.completions.create(**live.ask(n=3, seed=5, temperature=0.5))
        requests = live.engine.requests
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert [choice.message.content for choice in completion.choices] == ["1 2 ", "1 2 3 ", "1 2 3 4 "]
    assert len({request.prompt_ids for request in requests}) == 1
    assert len({request.id for request in requests}) == 3
    assert requests[0].params.seed == 5
    assert len({request.params.seed for request in requests}) == 3


def test_usage_counts_the_prompt_once_and_every_answers_tokens(running, counting):
    with running(counting()) as live:
        usage = live.post(n=3).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (2, 9, 11)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0, "the others find the blocks of the first"


def test_a_stream_interleaves_answers_each_whole_by_its_index(running, counting):
    with running(counting()) as live:
        stream = live.client().chat.completions.create(
            **live.ask(n=3, stream=True, stream_options={"include_usage": True})
        )
        *chunks, last = list(stream)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 9)
    order = [chunk.choices[0].index for chunk in chunks]
    assert order != sorted(order)
    for index, text in enumerate(["1 2 ", "1 2 3 ", "1 2 3 4 "]):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for choice in mine) == text
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_queue_too_short_for_all_is_a_status_and_leaves_nothing_running(running, counting, until, stream):
    with running(counting(fails=(1, FULL))) as live:
        response = live.post(n=2, stream=stream)
        assert (response.status_code, response.headers["retry-after"]) == (429, "3")
        until(lambda: not live.engine.running, "the end of the first")
        assert len(live.engine.aborted) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_all_its_answers(running, counting, until, stream):
    with running(counting(hold_at=2)) as live:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{live.url}/v1/chat/completions", json=live.ask(n=3, stream=stream), timeout=0.5)
        until(lambda: not live.service.active, "the end of the request")
        assert len(live.engine.aborted) == 3
        assert live.engine.running == 0


def test_an_error_of_one_answer_after_the_first_token_is_the_last_frame(running, counting):
    with running(counting(fails=(1, StepFailed("lost")))) as live:
        # The second fails as it begins, when the first has its token: nothing is out yet.
        assert live.post(n=2, stream=True).status_code == 500
    with running(counting(hold_at=2)) as live:
        live.engine.raise_at, live.engine.error = 2, StepFailed("lost")
        live.engine.release()
        last = live.post(n=2, stream=True).text.rstrip("\n").rpartition("data: ")[2]
        assert json.loads(last)["error"]["code"] == "generation_failed"
