"""Scheduler and pool, driven through random arrivals, failures, aborts and preemptions, against a model of
what the blocks contain: each token that was written is checked where a later one reads it."""

from zlib import crc32

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loader.kv_layout import KvGroup, KvLayout
from service.engine.scheduler import Scheduler
from service.engine.sequence import Sequence
from service.engine.types import Request, SamplingParams

# Of which other it takes the beginning, how many tokens of that, how many new ones follow, which, answer.
PROMPTS = st.tuples(
    st.integers(0, 9), st.integers(0, 40), st.integers(1, 24), st.integers(0, 7), st.integers(1, 30)
)
WINDOWS = [(None,), (None,), (7,), (None, 5), (3, 9), (None, 1, 6)]


def content(ids):
    """Of each place in `ids`, what a layer would store: it depends on the token and on all before it."""
    mark, marks = 0, []
    for token in ids:
        mark = crc32(token.to_bytes(4, "little"), mark) ^ 0x5BD1E995
        marks.append(mark)
    return marks


class Engine(RuleBasedStateMachine):
    """The engine's part, with a runner that remembers what was written where."""

    @initialize(
        windows=st.sampled_from(WINDOWS),
        block=st.sampled_from([2, 4]),
        concurrency=st.sampled_from([1, 3, 5, 8]),
        chunk=st.integers(6, 24),
        spare=st.sampled_from([0, 0, 1, 4, 12]),
        reuse=st.sampled_from([True, True, False]),
        mixed=st.sampled_from([None, 4, 9]),
    )
    def start(self, windows, block, concurrency, chunk, spare, reuse, mixed):
        self.block, self.concurrency, self.chunk = block, concurrency, chunk
        self.mixed = min(mixed or chunk, chunk)
        self.context = 40
        groups = [KvGroup(window, (), 0) for window in windows]
        least = [group.blocks_for(self.context, chunk, block) for group in groups]
        self.groups = [
            KvGroup(group.window, (number,), blocks + spare * (number + 1) // 2)
            for number, (group, blocks) in enumerate(zip(groups, least, strict=True))
        ]
        self.scheduler = Scheduler(KvLayout(block, tuple(self.groups)), concurrency, chunk, reuse, mixed)
        self.reuse = reuse
        self.written = [{} for _ in self.groups]  # of each group: (block, offset) -> content
        self.known = {}  # key of a block -> what has to be in it
        self.line = []  # those that never ran, as they came
        self.running = []  # the oldest first
        self.past = []  # what ended requests consisted of
        self.count = self.ended = self.successes = 0
        self.second_try = False
        self.limit = chunk
        self.settled = True  # no step is under way, or it broke

    # What clients do.

    @rule(prompts=st.lists(PROMPTS, min_size=1, max_size=4))
    def arrive(self, prompts):
        """Prompts of their own, or that begin like another: a second turn, a shared system prompt."""
        for which, cut, fresh, pattern, answer in prompts:
            others = [(), *self.past[-4:], *(one.tokens for one in [*self.line, *self.running])]
            new = [pattern >> place % 3 & 1 for place in range(fresh)]
            prompt = [*others[which % len(others)][:cut], *new][: self.context - answer]
            params = SamplingParams(max_tokens=answer)
            one = Sequence(Request(str(self.count), tuple(prompt), params), None, None, float(self.count))
            one.cached = -1
            self.count += 1
            self.line.append(one)
            self.scheduler.add(one)

    @precondition(lambda self: not self.scheduler.idle)
    @rule(data=st.data())
    def abort(self, data):
        self.leave(data.draw(st.sampled_from(list(self.scheduler)), label="who"))

    # What the engine does.

    @rule(times=st.integers(1, 12))
    def steps(self, times):
        for _ in range(times):
            if self.scheduler.idle:
                break
            self.finish(self.schedule())

    @precondition(lambda self: not self.scheduler.idle)
    @rule(shrink=st.booleans(), leave=st.booleans(), restart=st.booleans())
    def failed_step(self, shrink, leave, restart):
        """The rows' places are undefined afterwards. Their requests are lost, or the step is tried again, or
        they begin again."""
        step = self.schedule()
        for scheduled in step.rows:
            for number in range(len(self.groups)):
                for place in range(scheduled.row.start, scheduled.row.start + len(scheduled.row.ids)):
                    self.written[number][self.place(scheduled.row, number, place)] = "undefined"
        if restart:
            self.scheduler.restart(step)
            assert not any(scheduled.sequence.computed for scheduled in step.rows)
        else:
            self.scheduler.forget(step)
        self.successes = 0
        self.settled = True
        if shrink:
            size = sum(len(scheduled.row.ids) for scheduled in step.rows)
            self.second_try = size == 1 and not self.second_try
            assert self.scheduler.shrink() == (size > 1 or self.second_try)
            self.limit = size // 2 if size > 1 else self.limit
        elif leave:
            for scheduled in step.rows:
                self.leave(scheduled.sequence)

    @precondition(lambda self: not self.scheduler.idle)
    @rule(data=st.data())
    def break_one(self, data):
        """Nobody finds a block by its tokens any more."""
        gone = data.draw(st.sampled_from(list(self.scheduler)), label="who")
        keys = self.scheduler._holdings[gone].keys
        self.leave(gone, broken=True)
        for group in self.scheduler.pool._groups:
            assert not group.index.keys() & set(keys)

    @precondition(lambda self: not self.scheduler.idle)
    @rule(data=st.data())
    def abort_in_a_step(self, data):
        step = self.schedule()
        self.write(step)
        gone = data.draw(st.sampled_from(list(self.scheduler)), label="who")
        self.leave(gone)
        self.finish(step, written=True, gone=gone)

    def schedule(self):
        self.settled = False
        ran, waited = list(self.running), list(self.line)
        step = self.scheduler.schedule()
        self.check_limits(step)
        self.check_order(step, ran, waited)
        self.running = [one for one in [*ran, *step.admitted] if one not in step.preempted]
        self.line = [one for one in waited if one not in step.admitted]
        for one in step.admitted:
            assert one.cached >= 0
            assert one.computed % self.block == 0
            assert one.computed < len(one.tokens)
            assert self.reuse or one.computed == 0
        return step

    def finish(self, step, written=False, gone=None):
        if not written:
            self.write(step)
        self.scheduler.finish(step)
        self.second_try = False
        self.successes += 1
        if self.successes == 16:
            self.limit, self.successes = min(self.chunk, self.limit * 2), 0
        self.what_can_be_found_was_written()
        for scheduled in step.rows:
            one, row = scheduled.sequence, scheduled.row
            if one is gone:
                continue
            assert one.computed == row.start + len(row.ids)
            if row.sample:
                self.choose(one)
        self.settled = True

    def choose(self, one):
        """The next token follows from those before it, so that equal prompts have equal answers."""
        one.tokens.append(content(one.tokens)[-1] % 2)
        if one.generated == one.request.params.max_tokens:
            self.leave(one)

    def leave(self, one, broken=False):
        self.scheduler.remove(one, broken)
        self.ended += 1
        self.past.append(tuple(one.tokens))
        self.running = [other for other in self.running if other is not one]
        self.line = [other for other in self.line if other is not one]

    # What the runner does.

    def place(self, row, number, token):
        return row.tables[number][token // self.block], token % self.block

    def write(self, step):
        """First all rows write, as each layer does; then each token of theirs reads what it sees."""
        seen = set()
        for scheduled in step.rows:
            row, marks = scheduled.row, content(scheduled.sequence.tokens)
            for number, group in enumerate(self.groups):
                assert len(row.tables[number]) * self.block >= row.start + len(row.ids)
                for token in range(row.start, row.start + len(row.ids)):
                    place = self.place(row, number, token)
                    assert 0 <= place[0] < group.blocks
                    assert (number, *place) not in seen, "two rows write to the same place"
                    seen.add((number, *place))
                    self.written[number][place] = marks[token]
        for scheduled in step.rows:
            row, marks = scheduled.row, content(scheduled.sequence.tokens)
            for number, group in enumerate(self.groups):
                first = 0 if group.window is None else max(0, row.start - group.window + 1)
                for token in range(first, row.start + len(row.ids)):
                    assert self.written[number].get(self.place(row, number, token)) == marks[token]

    # What has to hold.

    def check_limits(self, step):
        sizes = [len(scheduled.row.ids) for scheduled in step.rows]
        assert all(sizes)
        assert len(sizes) <= self.concurrency
        assert sum(sizes) <= self.limit
        readers = [one for one in step.rows if one.sequence.pending > 1 or one.sequence in step.admitted]
        reading = [len(one.row.ids) for one in readers]
        if len(reading) < len(sizes):
            assert sum(reading) <= self.mixed
        assert step.rows or self.scheduler.idle
        for scheduled in step.rows:
            one, row = scheduled.sequence, scheduled.row
            assert one.running
            assert row.start == one.computed
            assert list(row.ids) == one.tokens[row.start : row.start + len(row.ids)]
            assert row.sample == (row.start + len(row.ids) == len(one.tokens))
        assert len({id(scheduled.sequence) for scheduled in step.rows}) == len(sizes)

    def check_order(self, step, ran, waited):
        assert set(step.preempted) <= set(ran), "one that starts does not lose its blocks in the same step"
        assert ran[len(ran) - len(step.preempted) :] == list(reversed(step.preempted)), "not the youngest"
        assert not (step.preempted and step.admitted)
        rows = {scheduled.sequence: scheduled.row for scheduled in step.rows}
        left = [one for one in ran if one not in step.preempted]
        decoding = [one for one in left if one.pending == 1]
        if left and self.limit > len(decoding):
            assert left[0] in rows, "the oldest goes on"
        reading = [one for one in left if one.pending > 1]
        if reading and reading[0] is left[0] and reading[0] in rows and not step.preempted:
            self.check_half(rows, reading[0])
        for place, one in enumerate(waited):
            if one in step.admitted and not set(waited[:place]) <= set(step.admitted):
                assert rows[one].sample, "only a prompt that is read to its end overtakes"

    def check_half(self, rows, first):
        """Who came first reads as much as all others together, or to its end, or what it has blocks for."""
        others = sum(len(row.ids) for one, row in rows.items() if one.pending > 1 and one is not first)
        row = rows[first]
        full = len(row.tables[0]) * self.block == row.start + len(row.ids)
        assert row.sample or full or len(row.ids) >= others

    @invariant()
    def who_is_where(self):
        if not hasattr(self, "scheduler"):
            return
        everyone = list(self.scheduler)
        assert self.ended + len(everyone) == self.count
        assert everyone[: self.scheduler.running] == self.running
        waiting = everyone[self.scheduler.running :]
        assert len(waiting) == self.scheduler.waiting
        again = [one for one in waiting if one.preemptions]
        assert waiting == [*again, *self.line]
        assert [one.arrived for one in self.line] == sorted(one.arrived for one in self.line)
        assert self.scheduler.overdue(self.count / 2) == [
            one for one in self.line if one.arrived < self.count / 2
        ]
        assert all(one.running and one.computed < len(one.tokens) for one in self.running)
        assert not any(one.running or one.computed for one in waiting)

    @invariant()
    def no_block_leaks(self):
        """Each block is free, idle or held, by as many as have it in their tables."""
        if not hasattr(self, "scheduler"):
            return
        pool = self.scheduler.pool
        holdings = list(self.scheduler._holdings.values())
        used = 0
        for number, (group, spec) in enumerate(zip(pool._groups, self.groups, strict=True)):
            held = [0] * spec.blocks
            for holding in holdings:
                mine = holding.tables[number][holding.dropped[number] :]
                assert len(set(mine)) == len(mine)
                for block in mine:
                    held[block] += 1
            assert held == group.held
            nobodys = [block for block in range(spec.blocks) if not held[block]]
            assert sorted([*group.free, *group.idle]) == nobodys
            assert all((group.keys[block] is None) == (block in group.free) for block in nobodys)
            assert {
                group.keys[block]: block for block in range(spec.blocks) if group.keys[block]
            } == group.index
            used += spec.blocks - len(nobodys)
        assert pool.blocks_used == used
        assert not any(
            holding.tables[0] for one, holding in self.scheduler._holdings.items() if not one.running
        )

    @invariant()
    def what_can_be_found_was_written(self):
        if not hasattr(self, "scheduler"):
            return
        for one, holding in self.scheduler._holdings.items():
            if holding.keys and holding.keys[-1] not in self.known:
                marks = content(one.tokens)
                for place, key in enumerate(holding.keys):
                    self.known[key] = marks[place * self.block : (place + 1) * self.block]
        for group, written in zip(self.scheduler.pool._groups, self.written, strict=True):
            for key, block in group.index.items():
                there = [written.get((block, offset)) for offset in range(self.block)]
                assert there == self.known.get(key, there)

    @invariant()
    def a_sliding_sequence_holds_no_more_than_the_plan_says(self):
        if not hasattr(self, "scheduler"):
            return
        for one in self.running:
            holding = self.scheduler._holdings[one]
            for table, dropped, group in zip(holding.tables, holding.dropped, self.groups, strict=True):
                assert not any(table[:dropped])
                assert len(table) - dropped <= group.blocks_for(self.context, self.chunk, self.block)

    def teardown(self):
        """Every request ends, in a number of steps that does not depend on luck, and nothing stays held."""
        if not getattr(self, "settled", False):
            return
        for _ in range(200 + 60 * len(list(self.scheduler))):
            if self.scheduler.idle:
                break
            self.finish(self.schedule())
            self.who_is_where()
            self.no_block_leaks()
        assert self.scheduler.idle
        assert self.ended == self.count
        assert self.scheduler.pool.blocks_used == self.scheduler.pool.tokens_used == 0


TestSchedulerAndPool = Engine.TestCase
TestSchedulerAndPool.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
