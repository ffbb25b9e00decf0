"""One thread that steps all requests through the model together: read the inbox, schedule, compute, tell."""

from __future__ import annotations

import logging
import threading
import time
from asyncio import AbstractEventLoop
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from service.engine.answer import Answer
from service.engine.attempt import Failure, attempt
from service.engine.channel import Channel, Chosen, Outbox
from service.engine.guards import check_pool, check_request
from service.engine.rows import StepRunner
from service.engine.sampler import BadLogits, Choice, Sampler, SamplingState
from service.engine.scheduler import Scheduler, Step
from service.engine.sequence import Sequence
from service.engine.stats import Capacity, Ended, Meter, Occupancy, StepCount
from service.engine.types import (
    EngineDead,
    EngineStats,
    Request,
    StepFailed,
    TokenEvent,
    WaitedTooLong,
)

CLOSE_SECONDS = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Leave:
    """A message to the thread: the client of this request needs no more tokens."""

    sequence: Sequence
    reason: str  # "cancelled": it has gone; "stop": its text has reached a stop string


class StepEngine:
    """Serves up to `runner.concurrency` requests at once; `max_queue` more wait, none longer than
    `max_wait_s`.

    The thread knows token ids alone. Text is made where the client waits, on its event loop, so that it does
    not hold up the next step. Takes the runner over: from here on only the engine's thread calls it, and
    `close` closes it. Raises ValueError when the runner's pool does not hold one whole context.
    """

    def __init__(
        self, runner: StepRunner, tokenizer: Any, max_queue: int = 64, max_wait_s: float | None = None
    ) -> None:
        check_pool(runner)
        self._runner, self._tokenizer, self._max_wait_s = runner, tokenizer, max_wait_s
        layout = runner.layout
        self._scheduler = Scheduler(layout, runner.concurrency, runner.chunk_tokens, runner.prefix_reuse)
        self._sampler, self._outbox = Sampler(), Outbox()
        self._urgent = False  # somebody waits for a first token, and the outbox has it
        self._closed: set[AbstractEventLoop] = set()  # nobody receives there any more
        self._looked_up = self._found = 0  # prompt tokens, for prefix reuse
        blocks = self._scheduler.pool.blocks_total
        self._meter = Meter(Capacity(runner.concurrency, runner.context, max_queue, layout.tokens, blocks))
        self._inbox: SimpleQueue[Sequence | _Leave | None] = SimpleQueue()  # None: close
        self._door = threading.Lock()  # nobody enters while the thread looks into the inbox for the last time
        self._cause_of_death: str | None = None
        # A daemon, so that an engine that nobody closed does not keep a failing program from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # On the caller's event loop

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        check_request(request, self._runner)
        answer = Answer(request.params, self._tokenizer)
        sequence = self._submit(request)
        try:
            while True:
                for chosen in await sequence.channel.receive():
                    event = answer.push(chosen)
                    if answer.stopped:
                        self._leave(sequence, "stop")
                    yield event
                    if event.finish_reason:
                        return
        finally:
            self._leave(sequence, "cancelled")

    def stats(self) -> EngineStats:
        return self._meter.snapshot()

    def close(self) -> None:
        """Waits for the step that is being computed, but not for ever: a device may hang."""
        self._inbox.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.error("the step being computed did not end in %d s: leaving it behind", CLOSE_SECONDS)

    def _submit(self, request: Request) -> Sequence:
        sequence = Sequence(request, Channel(), SamplingState(request.params, request.prompt_ids))
        with self._door:
            if self._cause_of_death is not None:
                raise EngineDead(self._cause_of_death)
            self._meter.enqueue()
            self._inbox.put(sequence)
        return sequence

    def _leave(self, sequence: Sequence, reason: str) -> None:
        """The first reason counts; none does for a request that the thread has ended by itself."""
        if not sequence.finished:
            self._inbox.put(_Leave(sequence, reason))

    # On the engine's thread

    def _run(self) -> None:
        cause = "the engine was closed"
        try:
            while self._read_inbox():
                self._advance()
        except BaseException as error:
            log.critical("the engine's thread ends", exc_info=True)
            cause = f"the engine ended: {type(error).__name__}: {error}"
        self._bury(cause)

    def _read_inbox(self) -> bool:
        """Take every message, and wait for one when there is nothing to do. False: the engine is to close."""
        while True:
            if self._scheduler.idle:
                self._tell()  # no step will
            try:
                message = self._inbox.get(block=self._scheduler.idle)
            except Empty:
                return True
            if message is None:
                return False
            if isinstance(message, Sequence):
                self._scheduler.add(message)
            elif not message.sequence.finished:
                self._meter.end([self._remove(message.sequence, message.reason)], self._occupancy())

    def _advance(self) -> None:
        """One step of everyone whose turn it is. What it gives is told while the next one is computed: then
        making text and sending it, on the event loop's thread, keeps nobody from the interpreter. But first
        tokens are told at once, with all that the step gave.

        Counts first, then tells: who has seen the last event finds the request gone from the statistics.
        """
        began = time.monotonic()
        self._turn_away_overdue(began)
        step = self._scheduler.schedule()
        if step.rows:
            self._place(step, began)
            outcome = attempt(self._runner, self._sampler, step, self._tell)
            if isinstance(outcome, Failure):
                self._get_over(step, outcome)
            else:
                self._settle(step, outcome, began)
        if self._urgent:
            self._tell()
        self._let_go_of_the_deaf()

    def _turn_away_overdue(self, now: float) -> None:
        if self._max_wait_s is None:
            return
        overdue = self._scheduler.overdue(now - self._max_wait_s)
        if not overdue:
            return
        retry_after_s = self._meter.retry_after_s()
        for sequence in overdue:
            self._outbox.put(sequence.channel, WaitedTooLong(now - sequence.arrived, retry_after_s))
        self._meter.end([self._remove(sequence, "timed_out") for sequence in overdue], self._occupancy())

    def _place(self, step: Step, now: float) -> None:
        if not step.admitted and not step.preempted:
            return
        new = [sequence for sequence in step.admitted if sequence.admitted is None]
        for sequence in new:
            sequence.admitted = now
        if self._runner.prefix_reuse:
            self._looked_up += sum(sequence.prompt_tokens for sequence in new)
            self._found += sum(sequence.cached for sequence in new)
        waits = [now - sequence.arrived for sequence in new]
        self._meter.place(waits, len(step.preempted), self._occupancy())

    def _get_over(self, step: Step, failure: Failure) -> None:
        """Out of memory: again, while there is something to try. Otherwise the step's requests are lost.
        Raises DeviceLost when no later step can succeed."""
        if self._runner.one_state:
            self._scheduler.restart(step)
        else:
            self._scheduler.forget(step)
        self._runner.recover()
        if failure.out_of_memory and self._scheduler.shrink():
            log.warning("a step of %d requests is tried again: %s", len(step.rows), failure.message)
            self._meter.run_out(self._occupancy())
            return
        if failure.out_of_memory:
            log.error("the smallest step of %d requests failed: %s", len(step.rows), failure.message)
        lost = [scheduled.sequence for scheduled in step.rows]
        for sequence in lost:
            self._outbox.put(sequence.channel, StepFailed(failure.message))
        self._meter.end([self._remove(sequence, "error") for sequence in lost], self._occupancy())

    def _settle(self, step: Step, choices: list[Choice | BadLogits], began: float) -> None:
        now = time.monotonic()
        count = StepCount(len(step.rows))
        sampled = [scheduled.sequence for scheduled in step.rows if scheduled.row.sample]
        chosen = list(zip(sampled, choices, strict=True))
        for sequence, choice in chosen:
            if isinstance(choice, BadLogits):
                # Gone before `finish`, so that nobody is given its broken blocks.
                count.ended.append(self._remove(sequence, "error", broken=True))
                self._outbox.put(sequence.channel, StepFailed(str(choice)))
        self._scheduler.finish(step)
        for sequence, choice in chosen:
            if not isinstance(choice, BadLogits):
                self._take(sequence, choice, now, count)
        count.seconds = time.monotonic() - began
        self._meter.step(count, self._occupancy())

    def _take(self, sequence: Sequence, choice: Choice, now: float, count: StepCount) -> None:
        sequence.tokens.append(choice.token_id)
        if sequence.last_token is None:
            count.prompt_tokens += sequence.prompt_tokens
            count.first_token_s.append(now - sequence.arrived)
            self._urgent = True
        else:
            count.next_token_s.append(now - sequence.last_token)
        sequence.last_token = now
        reason = self._reason(sequence, choice.token_id)
        if reason:
            count.ended.append(self._remove(sequence, reason))
        chosen = Chosen(choice.token_id, reason, choice.logprobs, sequence.cached, sequence.queued_s)
        self._outbox.put(sequence.channel, chosen)

    def _reason(self, sequence: Sequence, token_id: int) -> str | None:
        params = sequence.request.params
        if token_id in params.stop_token_ids:
            return "stop"
        full = len(sequence.tokens) >= self._runner.context
        return "length" if full or sequence.generated >= params.max_tokens else None

    def _remove(self, sequence: Sequence, reason: str, broken: bool = False) -> Ended:
        """Free the request's blocks and take it out; `broken`: nobody is to find its blocks."""
        self._scheduler.remove(sequence, broken)
        return _ended(sequence, reason)

    def _tell(self) -> None:
        self._urgent = False
        self._closed.update(self._outbox.deliver())

    def _let_go_of_the_deaf(self) -> None:
        """Between steps: a step's sequences stay until it has been settled."""
        if self._closed:
            gone = [sequence for sequence in self._scheduler if sequence.channel.loop in self._closed]
            self._closed.clear()
            self._meter.end([self._remove(sequence, "cancelled") for sequence in gone], self._occupancy())

    def _occupancy(self) -> Occupancy:
        return Occupancy(
            running=self._scheduler.running,
            kv_blocks=self._scheduler.pool.blocks_used,
            kv_tokens=self._scheduler.pool.tokens_used,
            prefix_queries=self._looked_up,
            prefix_hits=self._found,
        )

    def _bury(self, cause: str) -> None:
        """Let nobody in, answer everyone who is here, give the memory back.

        The runner comes last: it may be what is broken, and nobody must hang for that.
        """
        with self._door:
            self._cause_of_death = cause
        left = list(self._scheduler)
        while not self._inbox.empty():
            if isinstance(message := self._inbox.get(), Sequence):
                left.append(message)
        self._meter.die([_ended(sequence, "error") for sequence in left])
        for sequence in left:
            self._outbox.put(sequence.channel, EngineDead(cause))
        self._outbox.deliver()
        self._runner.close()


def _ended(sequence: Sequence, reason: str) -> Ended:
    sequence.finished = True
    now = time.monotonic()
    run_s = None if sequence.admitted is None else now - sequence.admitted
    return Ended(reason, now - sequence.arrived, run_s)
