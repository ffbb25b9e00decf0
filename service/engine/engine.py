"""One thread that steps requests through the model: read the inbox, admit, step, emit."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import AsyncGenerator
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from service.engine.answer import Answer
from service.engine.channel import Channel
from service.engine.kv import KvSlots
from service.engine.sampler import Sampler
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.stats import Capacity, Meter
from service.engine.types import (
    EngineDead,
    EngineError,
    EngineStats,
    Request,
    RequestTooLong,
    StepFailed,
    TokenEvent,
)

CLOSE_SECONDS = 20

log = logging.getLogger(__name__)


class StepRunner(Protocol):
    """What the engine needs of `service.engine.runner.Runner`."""

    context: int
    concurrency: int
    chunk_tokens: int

    def step(self, slot: int, ids: Ids[int]) -> Any: ...
    def release(self, slot: int) -> None: ...
    def check_device(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Leave:
    """A message to the thread: the client of this request has gone."""

    sequence: Sequence


class StepEngine:
    """Steps one request at a time; up to `runner.concurrency` take turns, `max_queue` more wait in line.

    Takes the runner over: from here on only the engine's thread calls it, and `close` closes it.
    """

    def __init__(self, runner: StepRunner, tokenizer: Any, max_queue: int = 64) -> None:
        self._runner, self._tokenizer = runner, tokenizer
        self._slots = KvSlots(runner.concurrency, runner.context)
        self._scheduler = Scheduler(self._slots)
        self._meter = Meter(Capacity(runner.concurrency, runner.context, max_queue))
        self._inbox: SimpleQueue[Sequence | _Leave | None] = SimpleQueue()  # None: close
        self._door = threading.Lock()  # nobody enters while the thread looks into the inbox for the last time
        self._cause_of_death: str | None = None
        # A daemon, so that an engine that nobody closed does not keep a failing program from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # On the caller's event loop

    async def generate(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        sequence = self._submit(request)
        try:
            while True:
                event = await sequence.channel.receive()
                yield event
                if event.finish_reason:
                    return
        finally:
            if not sequence.finished:
                self._inbox.put(_Leave(sequence))

    def stats(self) -> EngineStats:
        return self._meter.snapshot()

    def close(self) -> None:
        """Waits for the step that is being computed, but not for ever: a device may hang."""
        self._inbox.put(None)
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.error("the step being computed did not end in %d s: leaving it behind", CLOSE_SECONDS)

    def _submit(self, request: Request) -> Sequence:
        prompt_tokens, context = len(request.prompt_ids), self._runner.context
        if prompt_tokens >= context:
            raise RequestTooLong(prompt_tokens, context)
        if not prompt_tokens or request.params.max_tokens < 1:
            raise ValueError(f"request {request.id} has no prompt, or asks for no token")
        answer = Answer(request.params, self._tokenizer, room=context - prompt_tokens)
        sequence = Sequence(request, Sampler(request.params, request.prompt_ids), answer, Channel())
        with self._door:
            if self._cause_of_death is not None:
                raise EngineDead(self._cause_of_death)
            self._meter.enqueue()
            self._inbox.put(sequence)
        return sequence

    # On the engine's thread

    def _run(self) -> None:
        cause = "the engine was closed"
        try:
            while self._read_inbox():
                self._admit()
                self._emit(self._step())
        except BaseException as error:
            log.critical("the engine's thread ends", exc_info=True)
            cause = f"the engine ended: {type(error).__name__}: {error}"
        self._bury(cause)

    def _read_inbox(self) -> bool:
        """Take every message, and wait for one when there is nothing to do. False: the engine is to close."""
        while True:
            try:
                message = self._inbox.get(block=self._scheduler.idle)
            except Empty:
                return True
            if message is None:
                return False
            self._take(message)

    def _take(self, message: Sequence | _Leave) -> None:
        if isinstance(message, Sequence):
            self._scheduler.add(message)
        elif not message.sequence.finished:
            self._finish(message.sequence, "cancelled")

    def _admit(self) -> None:
        for sequence in self._scheduler.admit():
            sequence.admitted = time.monotonic()
            self._meter.admit(sequence.admitted - sequence.arrived)

    def _step(self) -> tuple[Sequence, TokenEvent | EngineError] | None:
        """One forward for the request whose turn it is; None when it gave no token."""
        sequence = self._scheduler.next()
        if sequence is None:
            return None
        try:
            event = self._advance(sequence)
            return (sequence, event) if event else None
        except Exception as error:
            log.exception("a step of request %s failed", sequence.request.id)
            # Without the cause: its traceback holds the step's tensors, and the client holds this.
            failed = StepFailed(f"{type(error).__name__}: {error}")
        self._runner.check_device()
        return sequence, failed

    def _advance(self, sequence: Sequence) -> TokenEvent | None:
        assert sequence.slot is not None
        ids = sequence.next_ids(self._runner.chunk_tokens)
        logits = self._runner.step(sequence.slot, ids)
        self._slots.fill(sequence.slot, len(ids))
        if sequence.reading:
            sequence.count_read(len(ids))
            self._meter.read_prompt(len(ids))
        if sequence.reading:
            return None
        token_id = sequence.sampler.choose(logits)
        sequence.count_generated(token_id)
        return sequence.answer.push(token_id)

    def _emit(self, outcome: tuple[Sequence, TokenEvent | EngineError] | None) -> None:
        """Count first, then send: who has seen the last event finds the request gone from the statistics."""
        self._meter.hold_kv(self._slots.tokens_used)
        if outcome is None:
            return
        sequence, item = outcome
        if isinstance(item, EngineError):
            self._finish(sequence, "error")
        else:
            self._time_token(sequence)
            if item.finish_reason:
                self._finish(sequence, item.finish_reason)
        if not sequence.channel.send(item) and not sequence.finished:
            self._finish(sequence, "cancelled")

    def _time_token(self, sequence: Sequence) -> None:
        now = time.monotonic()
        if sequence.last_token is None:
            self._meter.first_token(now - sequence.arrived)
        else:
            self._meter.next_token(now - sequence.last_token)
        sequence.last_token = now

    def _finish(self, sequence: Sequence, reason: str) -> None:
        """Free the request's cache and take it out."""
        if sequence.slot is not None:
            self._runner.release(sequence.slot)
        self._remove(sequence, reason)

    def _remove(self, sequence: Sequence, reason: str) -> None:
        self._scheduler.remove(sequence)
        sequence.finished = True
        now = time.monotonic()
        run_s = None if sequence.admitted is None else now - sequence.admitted
        self._meter.hold_kv(self._slots.tokens_used)
        self._meter.finish(reason, now - sequence.arrived, run_s)

    def _bury(self, cause: str) -> None:
        """Let nobody in, answer everyone who is here, give the memory back.

        The runner comes last: it may be what is broken, and nobody must hang for that.
        """
        with self._door:
            self._cause_of_death = cause
        self._meter.die()
        while not self._inbox.empty():
            if isinstance(message := self._inbox.get(), Sequence):
                self._scheduler.add(message)
        for sequence in self._scheduler:
            self._remove(sequence, "error")
            sequence.channel.send(EngineDead(cause))
        self._runner.close()
