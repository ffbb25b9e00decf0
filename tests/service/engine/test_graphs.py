"""Bookkeeping of CUDA graphs, over a graph that runs its work again."""

import pytest
import torch

from loader.kv_layout import KvGroup, KvLayout
from service.engine.batch import Batcher
from service.engine.graphs import DecodeGraphs, sizes
from service.engine.rows import Row

LAYOUT = KvLayout(4, (KvGroup(None, (0,), 10),))


class Recorded:
    """Stands for a graph: it knows nothing of the step but the addresses that were recorded."""

    def __init__(self, work):
        self.replay = work
        work()


class Forward:
    """Logits that show a row's id and length; keeps the sizes of the steps it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, step):
        batch = step.main
        self.seen.append(len(batch.starts))
        return torch.stack([batch.ids[0].float(), batch.lengths.float()], dim=1)


def graphs_of(concurrency=6, recorder=Recorded, forward=None):
    batcher = Batcher(LAYOUT, 20, concurrency, 16, torch.device("cpu"))
    return DecodeGraphs(batcher, forward or Forward(), concurrency, recorder)


def row(token_id=0, start=0, sample=True, count=1):
    return Row([token_id] * count, start, (list(range(5)),), sample)


@pytest.mark.parametrize(
    ("concurrency", "wanted"),
    [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (16, [1, 2, 4, 8, 16]), (17, [1, 2, 4, 8, 16, 17])],
)
def test_sizes_are_powers_of_two_up_to_all_rows(concurrency, wanted):
    assert sizes(concurrency) == wanted


def test_the_largest_is_recorded_first_so_that_the_others_fit_into_its_memory():
    forward = Forward()
    assert graphs_of(forward=forward).record(row())
    assert forward.seen == [6, 4, 2, 1]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_rows_get_their_own_logits_from_the_next_larger_graph(count):
    forward = Forward()
    graphs = graphs_of(forward=forward)
    graphs.record(row())
    logits = graphs.step([row(50 + at, start=at) for at in range(count)])
    assert logits.tolist() == [[50 + at, at + 1] for at in range(count)]
    assert forward.seen[-1] == min(size for size in (1, 2, 4, 6) if size >= count)


def test_only_rows_that_sample_are_given():
    graphs = graphs_of()
    graphs.record(row())
    logits = graphs.step([row(1), row(2, sample=False), row(3)])
    assert logits.tolist() == [[1, 1], [3, 1]]


def test_steps_with_a_chunk_are_not_replayed():
    graphs = graphs_of()
    graphs.record(row())
    assert graphs.step([row(1), row(2, count=2)]) is None


def test_nothing_is_replayed_before_it_was_recorded_nor_after_closing():
    graphs = graphs_of()
    assert graphs.step([row(1)]) is None
    graphs.record(row())
    graphs.close()
    assert graphs.step([row(1)]) is None


def test_a_model_that_cannot_be_recorded_runs_on_without(caplog):
    recorded = []

    def refuses(work):
        if len(recorded) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        recorded.append(Recorded(work))
        return recorded[-1]

    graphs = graphs_of(recorder=refuses)
    assert not graphs.record(row())
    assert "operation not permitted" in caplog.text
    assert graphs.step([row(1)]) is None
