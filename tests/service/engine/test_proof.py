"""A model that was changed is compared with what it was."""

from contextlib import contextmanager

import pytest
import torch

from loader.errors import LoaderError
from loader.kv_layout import KvGroup, KvLayout
from service.engine.proof import KernelsDiffer, prove

SWITCH = "--gpu-kernels off"


class Logits:
    """A runner whose logits are what `give(rows)` says."""

    context, concurrency, chunk_tokens, vocab = 64, 4, 32, 300
    layout = KvLayout(4, (KvGroup(None, (0,), 6),))

    def __init__(self, give, **sizes):
        self.give, self.seen, self.short = give, [], 0
        self.__dict__ |= sizes

    @contextmanager
    def shortened(self):
        self.short += 1
        yield
        self.short -= 1

    def step(self, rows):
        assert self.short, "all layers compute where one of each kind would do"
        self.seen.append(rows)
        return self.give(rows)


def normal(seed, rows=2, noise=0.0):
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, 300, generator=random)
    return logits + noise * torch.randn(rows, 300)


STEPS = 3  # of the proof: two prompts, a token more of both, and of one


def logits(seed, rows, noise=0.0):
    return normal(seed, len(rows), noise)


def changed(after):
    """What a runner gives whose logits are `after(rows)` once it has been changed."""

    def give(rows):
        return (after if len(runner.seen) > STEPS else lambda rows: logits(1, rows))(rows)

    runner = Logits(give)
    return runner


def test_rounding_passes():
    prove(changed(lambda rows: logits(1, rows, noise=0.05)), lambda: None, SWITCH)


@pytest.mark.parametrize(
    "after",
    [
        lambda rows: logits(2, rows),
        lambda rows: torch.full((len(rows), 300), torch.nan),
        lambda rows: torch.zeros(len(rows), 300),
        lambda rows: logits(1, rows).flip(0) if len(rows) > 1 else logits(1, rows),
        lambda rows: logits(1 if len(rows[0].ids) > 1 else 2, rows),
        lambda rows: logits(1 if len(rows) > 1 else 2, rows),
    ],
    ids=["all", "NaN", "zeros", "rows exchanged", "steps of single tokens", "a step of one"],
)
def test_other_logits_are_refused_before_anybody_is_served(after):
    with pytest.raises(KernelsDiffer, match=SWITCH) as caught:
        prove(changed(after), lambda: None, SWITCH)
    assert isinstance(caught.value, LoaderError)


def test_the_change_happens_between_the_two_steps():
    runner = Logits(lambda rows: logits(1, rows))
    prove(runner, lambda: runner.seen.append("changed"), SWITCH)
    assert runner.seen[STEPS] == "changed"
    assert runner.seen[:STEPS] == runner.seen[STEPS + 1 :]


def test_a_module_that_misses_its_weight_is_told_by_name():
    def give(rows):
        if len(runner.seen) > STEPS:
            raise AttributeError("'PackedLinear' object has no attribute 'weight'")
        return logits(1, rows)

    runner = Logits(give)
    with pytest.raises(KernelsDiffer, match="no attribute 'weight'"):
        prove(runner, lambda: None, SWITCH)


@pytest.mark.parametrize(
    "sizes",
    [
        {"concurrency": 1},
        {"chunk_tokens": 1},
        {"context": 2},
        {"layout": KvLayout(4, (KvGroup(None, (0,), 1), KvGroup(8, (1,), 3)))},
    ],
)
def test_the_rows_fit_what_there_is(sizes):
    runner = Logits(lambda rows: normal(1, len(rows)), **sizes)
    prove(runner, lambda: None, SWITCH)
    for rows in runner.seen:
        assert 1 <= len(rows) <= runner.concurrency
        assert sum(len(row.ids) for row in rows) <= runner.chunk_tokens
        room = min(runner.context, runner.layout.block_tokens)
        assert all(row.start + len(row.ids) <= room for row in rows)
    for row in rows:
        assert 1 <= len(row.ids) <= min(runner.context, runner.layout.block_tokens)
        assert all(0 <= token_id < runner.vocab for token_id in row.ids)
        assert len(row.tables) == len(runner.layout.groups)
    assert len({row.tables[0][0] for row in rows}) == len(rows)
