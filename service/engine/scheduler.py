"""Who runs, who waits, and what each puts into the next step. No torch, no clock, no thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from loader.kv_layout import KvLayout
from service.engine.kv import Holding, KvPool
from service.engine.rows import Row
from service.engine.sequence import Sequence

MIXED_TOKENS = 512  # of prompts that a step reads while anyone decodes
_OVERTAKEN = 16  # long prompts that a short one may start before, at most: it bounds the search in the line
_PATIENCE = 16  # successful steps, after one that was too large, until a step may be twice as large again


@dataclass(frozen=True, slots=True)
class Scheduled:
    sequence: Sequence
    row: Row


@dataclass(frozen=True, slots=True)
class Step:
    rows: tuple[Scheduled, ...]
    admitted: tuple[Sequence, ...]  # that run from this step on, for the first time or again
    preempted: tuple[Sequence, ...]  # that had to give their blocks back


class _Draft:
    """A step while it is being put together."""

    def __init__(self) -> None:
        self.tokens: dict[Sequence, int] = {}  # what each one computes
        self.left = 0  # tokens that may still be read
        self.kept = 0  # of these, for prompts that end in this step
        self.readers: list[Sequence] = []  # that run and have more than a token to compute, the oldest first
        self.admitted: list[Sequence] = []
        self.preempted: list[Sequence] = []
        self.short_of_blocks = False

    def share(self, pending: int) -> int:
        """What a prompt with `pending` tokens to read gets; 0: it is long, and those before it took all."""
        if pending <= self.kept:
            self.kept -= pending
            return pending
        return min(pending, self.left - self.kept)


class Scheduler:
    """First come, first served, from one KV pool. One step at a time: `schedule`, then `finish`, `forget` or
    `restart`.

    A step has one token of everyone who decodes; prompts are read with what is left of `chunk_tokens`. While
    anyone decodes, at most `mixed_tokens` (512) are read in a step: a long prompt must not hold up answers.

    Prompts are read in the order of arrival. But half of what a step can read is first offered to prompts
    that can be read to their end with it. So short ones start at once behind a long one, also when it still
    waits, and the long one gets at least the other half. What nobody wants goes on in order.

    A sequence that needs a block when there is none takes those of the youngest one that runs. That one goes
    to the front of the line and computes its tokens again. The youngest itself waits, with what it has.
    So the oldest always goes on; it can, because the pool holds one whole context: `guards.check_pool`.
    """

    def __init__(
        self,
        layout: KvLayout,
        concurrency: int,
        chunk_tokens: int,
        prefix_reuse: bool = True,
        mixed_tokens: int | None = None,
    ) -> None:
        self.pool = KvPool(layout, chunk_tokens, prefix_reuse)
        self._concurrency = concurrency
        self._chunk_tokens = self._budget = chunk_tokens
        self._mixed_tokens = min(chunk_tokens, MIXED_TOKENS if mixed_tokens is None else mixed_tokens)
        self._waiting: deque[Sequence] = deque()
        self._running: dict[Sequence, Holding] = {}  # the oldest first, by admission
        self._holdings: dict[Sequence, Holding] = {}  # of all
        self._last = 0  # tokens of the last step
        self._successes = 0  # since the budget last changed
        self._second_try = False  # the next step is that of one token that has failed before
        self._turn = 0  # where to begin among those who decode, when a step is too small for all

    @property
    def idle(self) -> bool:
        return not self._holdings

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """All that run and wait, as of now."""
        return iter([*self._running, *self._waiting])

    def overdue(self, before: float) -> list[Sequence]:
        """Those that wait, were never admitted and arrived before that time."""
        return [one for one in self._waiting if not one.preemptions and one.arrived < before]

    def add(self, sequence: Sequence) -> None:
        """To the end of the line."""
        self._holdings[sequence] = self.pool.holding()
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence, broken: bool = False) -> None:
        """Take one out that is here, at any point. Raises KeyError when it is not here.

        `broken`: what it has computed or found is not to be used again.
        """
        holding = self._holdings.pop(sequence)
        if broken:
            self.pool.unpublish(holding)
        self.pool.release(holding)
        if sequence.running:
            del self._running[sequence]
            sequence.running = False
        else:
            self._waiting.remove(sequence)

    def schedule(self) -> Step:
        """The next step. It has rows, unless nobody is here.

        Its tables are the pool's own lists: valid until `finish`, `forget` or `restart`. Raises RuntimeError
        when a sequence is alone and the pool is too small for it; never where the pool holds a whole context
        and no sequence has more tokens, and the engine sees to both.
        """
        draft = _Draft()
        self._decode(draft)
        room = self._budget - len(draft.tokens)
        draft.left = min(room, self._mixed_tokens) if draft.tokens else room
        for kept in (draft.left // 2, 0):
            draft.kept = kept
            self._read(draft)
            self._admit(draft)
        self._last = sum(draft.tokens.values())
        rows = [self._scheduled(sequence, tokens) for sequence, tokens in draft.tokens.items()]
        return Step(tuple(rows), tuple(draft.admitted), tuple(draft.preempted))

    def finish(self, step: Step) -> None:
        """Count what a successful forward has computed. Before the chosen tokens are appended."""
        for scheduled in step.rows:
            sequence = scheduled.sequence
            holding = self._running.get(sequence)
            if holding is not None:  # it may have been removed meanwhile
                sequence.computed = scheduled.row.start + len(scheduled.row.ids)
                self.pool.wrote(holding, sequence.tokens, sequence.computed)
        self._second_try = False
        self._successes += 1
        if self._successes >= _PATIENCE:
            self._budget = min(self._chunk_tokens, self._budget * 2)
            self._successes = 0

    def forget(self, step: Step) -> None:  # noqa: ARG002
        """The forward of `step` has failed. What it wrote lies behind `computed`, where nobody reads.

        The sequences run on and keep their blocks; those admitted in it keep what was found for them.
        """
        self._successes = 0

    def restart(self, step: Step) -> None:
        """As `forget`, where an error leaves nothing of the cache: the sequences run on, without a block, and
        compute all their tokens again."""
        self.forget(step)
        for scheduled in step.rows:
            holding = self._running.get(scheduled.sequence)
            if holding is not None:
                self.pool.release(holding)
                scheduled.sequence.computed = 0

    def shrink(self) -> bool:
        """Halve the tokens of a step, the last one being too large. False: there is nothing less to try.

        A step of one token gets a second try, because the first one's memory has been given back meanwhile.
        After some successful steps the tokens double, up to what they were.
        """
        size = min(self._budget, self._last)
        if size <= 1:
            self._second_try = size == 1 and not self._second_try
            return self._second_try
        self._budget = size // 2
        self._successes = 0
        self._second_try = False
        return True

    def _decode(self, draft: _Draft) -> None:
        """A token of each one whose prompt is read; when a step is too small for all, they take turns."""
        decoding: list[Sequence] = []
        for sequence in self._running:
            (decoding if len(sequence.tokens) - sequence.computed == 1 else draft.readers).append(sequence)
        if len(decoding) > self._budget:
            start = self._turn % len(decoding)
            decoding = decoding[start:] + decoding[:start]
            self._turn = start + self._budget
        for sequence in decoding:
            if len(draft.tokens) == self._budget:
                return
            holding = self._running.get(sequence)
            if holding is not None and (sequence.computed < holding.room or self._make_room(draft, sequence)):
                draft.tokens[sequence] = 1

    def _read(self, draft: _Draft) -> None:
        """Parts of the prompts that are being read."""
        for sequence in draft.readers:
            pending = sequence.pending - draft.tokens.get(sequence, 0)
            if sequence.running and pending and (tokens := draft.share(pending)):
                self._extend(draft, sequence, tokens)

    def _admit(self, draft: _Draft) -> None:
        """Start those who have waited longest: one needs a row, tokens of this step, and blocks to its end.

        One that only lacks tokens may be overtaken; for one that lacks blocks, all behind it wait.
        """
        place = 0
        while draft.left and len(self._running) < self._concurrency and not draft.short_of_blocks:
            if place == min(len(self._waiting), _OVERTAKEN + 1):
                return
            sequence = self._waiting[place]
            holding = self._holdings[sequence]
            found = self.pool.find(holding, sequence.tokens)
            if not (tokens := draft.share(len(sequence.tokens) - found)):
                place += 1
                continue
            if not self._fits(sequence, holding, found):
                draft.short_of_blocks = True
                return
            del self._waiting[place]
            self._start(sequence, holding, found)
            draft.admitted.append(sequence)
            draft.readers.append(sequence)
            self._extend(draft, sequence, tokens)

    def _fits(self, sequence: Sequence, holding: Holding, found: int) -> bool:
        """Some blocks stay for those that run already, or it would soon take theirs or lose its own."""
        tokens = len(sequence.tokens)
        if self.pool.fits(holding, found, tokens, spare=bool(self._running)):
            return True
        if not self._running:
            raise RuntimeError(f"a sequence has {tokens} tokens and the whole KV pool is too small for them")
        return False

    def _start(self, sequence: Sequence, holding: Holding, found: int) -> None:
        self.pool.take(holding, found)
        self._running[sequence] = holding
        sequence.running = True
        sequence.computed = found
        if not sequence.preemptions:
            sequence.cached = found

    def _extend(self, draft: _Draft, sequence: Sequence, tokens: int) -> None:
        """Let one read `tokens` more in this step, or as many as there are blocks for."""
        holding = self._running[sequence]
        planned = draft.tokens.get(sequence, 0)
        done = sequence.computed + planned
        if self.pool.room(holding) <= done and (planned or not self._make_room(draft, sequence)):
            return  # nobody loses blocks for more than a part of a prompt
        tokens = min(tokens, self.pool.room(holding) - done)
        self.pool.grow(holding, done + tokens)
        draft.tokens[sequence] = planned + tokens
        draft.left -= tokens

    def _make_room(self, draft: _Draft, sequence: Sequence) -> bool:
        """A place for one token more, if need be with blocks of younger ones. False: it is the youngest."""
        holding = self._running[sequence]
        while not self.pool.grow(holding, holding.room + 1):
            draft.short_of_blocks = True
            youngest = next(reversed(self._running))
            if youngest is not sequence:
                self._preempt(draft, youngest)
            elif len(self._running) > 1:
                return False
            else:
                raise RuntimeError(f"the whole KV pool is too small for {holding.room + 1} tokens")
        return True

    def _preempt(self, draft: _Draft, sequence: Sequence) -> None:
        self.pool.release(self._running.pop(sequence))
        sequence.running = False
        sequence.computed = 0
        sequence.preemptions += 1
        self._waiting.appendleft(sequence)
        draft.tokens.pop(sequence, None)  # what it gives up goes to nobody: the step is only smaller
        draft.preempted.append(sequence)

    def _scheduled(self, sequence: Sequence, tokens: int) -> Scheduled:
        start, end = sequence.computed, sequence.computed + tokens
        ids, tables = sequence.tokens[start:end], self._running[sequence].tables
        return Scheduled(sequence, Row(ids, start, tables, sample=end == len(sequence.tokens)))
