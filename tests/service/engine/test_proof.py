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


def test_rounding_passes():
    answers = iter([normal(1), normal(1, noise=0.05)])
    prove(Logits(lambda rows: next(answers)), lambda: None, SWITCH)


@pytest.mark.parametrize(
    "after",
    [normal(2), torch.full((2, 300), torch.nan), torch.zeros(2, 300), torch.stack([*normal(1)][::-1])],
)
def test_other_logits_are_refused_before_anybody_is_served(after):
    answers = iter([normal(1), after])
    with pytest.raises(KernelsDiffer, match=SWITCH) as caught:
        prove(Logits(lambda rows: next(answers)), lambda: None, SWITCH)
    assert isinstance(caught.value, LoaderError)


def test_the_change_happens_between_the_two_steps():
    runner = Logits(lambda rows: normal(1))
    prove(runner, lambda: runner.seen.append("changed"), SWITCH)
    before, change, after = runner.seen
    assert (before, change) == (after, "changed")


def test_a_module_that_misses_its_weight_is_told_by_name():
    def give(rows):
        if len(runner.seen) == 2:
            raise AttributeError("'PackedLinear' object has no attribute 'weight'")
        return normal(1)

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
    (rows, _) = runner.seen
    assert 1 <= len(rows) <= runner.concurrency
    assert sum(len(row.ids) for row in rows) <= runner.chunk_tokens
    for row in rows:
        assert 1 <= len(row.ids) <= min(runner.context, runner.layout.block_tokens)
        assert all(0 <= token_id < runner.vocab for token_id in row.ids)
        assert len(row.tables) == len(runner.layout.groups)
    assert len({row.tables[0][0] for row in rows}) == len(rows)
