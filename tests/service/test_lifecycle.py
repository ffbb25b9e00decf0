"""Service without HTTP: what loads, what it answers with, and what it gives back."""

import asyncio
import threading
from contextlib import ExitStack

import pytest

from service.backend import Backend, LoadCancelled, Progress
from service.engine.types import EngineDead
from service.lifecycle import Draining, LoadFailed, Loading, NotServing, Service
from service.prompt.defaults import GenerationDefaults

DEADLINE_S = 10


def run(coroutine):
    """On a loop, under a deadline: what hangs fails."""

    async def limited():
        async with asyncio.timeout(DEADLINE_S):
            return await coroutine

    return asyncio.run(limited())


@pytest.fixture
def backend(scripted):
    """A backend; `closed` tells what it gave back."""
    engine, closed = scripted(), []
    opened = ExitStack()
    opened.callback(closed.append, "engine")
    opened.callback(engine.close)
    made = Backend(engine, None, 64, GenerationDefaults(), 0, "float32", opened=opened)
    return made, closed


class Gate:
    """A load that waits at a cancellation point until it is released, and then does what it was made for."""

    def __init__(self, outcome, cancellable=True):
        self.outcome, self.cancellable = outcome, cancellable
        self.begun, self.release = threading.Event(), threading.Event()
        self.thread = None

    def __call__(self, progress):
        self.thread = threading.current_thread()
        self.begun.set()
        while not self.release.wait(0.002):
            if self.cancellable:
                progress(1, 2)
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


async def begun(service, gate):
    service.load_in_background()
    await asyncio.to_thread(gate.begun.wait, DEADLINE_S)


def test_before_loading_the_service_is_alive_in_no_sense():
    service = Service("m", lambda _progress: None)
    assert (service.ready, service.engine_alive, service.loaded, service.error) == (False, False, None, None)
    with pytest.raises(Loading, match=r"the model is being loaded \(starting\); GET /ready tells when"):
        service.backend()


def test_loading_leaves_the_event_loop_free_and_happens_on_a_thread_that_keeps_no_process_alive(backend):
    gate = Gate(backend[0])

    async def go():
        service = Service("m", gate)
        await begun(service, gate)
        assert gate.thread is not threading.main_thread()
        assert gate.thread.daemon
        assert service.loaded is None
        gate.release.set()
        await service.wait_until_loaded()
        assert service.loaded is backend[0]
        assert service.backend() is backend[0]
        assert service.ready
        await service.close()

    run(go())


def test_a_refusal_while_loading_tells_how_far_it_is():
    service = Service("m", lambda _progress: None)
    service.progress.enter("reading weights")
    service.progress(1_500_000, 3_000_000)
    with pytest.raises(Loading, match="reading weights, 1,500,000 of 3,000,000 bytes"):
        service.backend()
    service.progress.enter("rehearsing")
    with pytest.raises(Loading, match=r"\(rehearsing\)"):
        service.backend()


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3), KeyboardInterrupt("broken")])
def test_whatever_stops_a_load_is_kept_and_told_and_its_text_is_not_logged(error, service_log):
    async def go():
        service = Service("m", Gate(error))
        service._start.release.set()
        service.load_in_background()
        await service.wait_until_loaded()
        assert service.error is error
        assert not service.ready
        with pytest.raises(LoadFailed, match=str(error)):
            service.backend()
        await service.close()

    run(go())
    assert f"loading failed: {type(error).__name__}" in service_log.text
    assert "broken" not in service_log.text


def test_draining_cancels_a_load_which_is_neither_loaded_nor_an_error(backend):
    gate = Gate(backend[0])

    async def go():
        service = Service("m", gate)
        await begun(service, gate)
        service.drain()
        service.drain()
        await service.wait_until_loaded()
        assert (service.loaded, service.error) == (None, None)
        with pytest.raises(Draining):
            service.backend()
        await service.close()

    run(go())
    assert not gate.thread.is_alive()


def test_the_first_thing_a_stopping_service_says_is_that_it_stops(backend):
    made, _ = backend
    service = Service("m", lambda _progress: made)
    service.loaded, service.error = made, ValueError("broken")
    service.drain()
    assert not service.ready
    with pytest.raises(Draining):
        service.backend()


def test_a_dead_engine_is_told_as_such_and_the_service_is_not_ready(backend):
    service = Service("m", lambda _progress: None)
    service.loaded = backend[0]
    assert service.ready
    backend[0].engine.alive = False
    assert (service.ready, service.engine_alive) == (False, False)
    with pytest.raises(EngineDead, match="must be started again"):
        service.backend()


def test_closing_gives_everything_back_once(backend):
    made, closed = backend

    async def go():
        service = Service("m", lambda _progress: made)
        service.load_in_background()
        await service.wait_until_loaded()
        await service.close()
        assert closed == ["engine"]
        assert (service.loaded, service.draining, made.engine.alive) == (None, True, False)
        await service.close()

    run(go())
    assert closed == ["engine"]


def test_a_model_that_is_loaded_while_the_service_closes_is_given_back_too(backend):
    made, closed = backend
    gate = Gate(made, cancellable=False)

    async def go():
        service = Service("m", gate)
        await begun(service, gate)
        closing = asyncio.create_task(service.close(limit_s=DEADLINE_S))
        await asyncio.sleep(0)
        assert service.draining
        gate.release.set()
        await closing
        assert service.loaded is None

    run(go())
    assert closed == ["engine"]


def test_a_load_that_never_comes_to_a_cancellation_point_does_not_hold_closing_up(backend, service_log):
    gate = Gate(backend[0], cancellable=False)

    async def go():
        service = Service("m", gate)
        await begun(service, gate)
        await service.close(limit_s=0.01)
        assert gate.thread.is_alive()

    run(go())
    gate.release.set()
    gate.thread.join(DEADLINE_S)
    assert not gate.thread.is_alive()
    assert "the event loop had ended before loading did" in service_log.text


def test_a_service_that_was_never_started_can_be_closed():
    run(Service("m", lambda _progress: None).close())


def test_requests_are_counted_while_they_are_answered_also_those_that_fail():
    service = Service("m", lambda _progress: None)
    with service.answering(), service.answering():
        assert service.active == 2
    with pytest.raises(KeyError), service.answering():
        raise KeyError
    assert service.active == 0


def test_every_call_of_progress_is_a_point_where_loading_can_be_cancelled():
    progress = Progress()
    progress.enter("reading weights")
    progress(1, 2)
    progress.cancel()
    before = progress.state
    for call in (lambda: progress(2, 2), lambda: progress.enter("rehearsing")):
        with pytest.raises(LoadCancelled):
            call()
    assert progress.state == before


def test_why_nothing_is_served_is_always_told_with_a_time_to_come_back():
    reasons = [Loading(Progress().state.as_dict()), Draining(), LoadFailed(ValueError("x")), NotServing("x")]
    assert len({reason.code for reason in reasons}) == len(reasons)
    assert all(reason.retry_after_s >= 1 for reason in reasons)
