"""Rows -> tensors: every number of a step, counted by hand or one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.kv_layout import KvGroup, KvLayout
from service.engine.batch import FORMS_KEPT, Batcher
from service.engine.rows import Row

CPU = torch.device("cpu")
LAYOUT = KvLayout(4, (KvGroup(None, (0,), 50), KvGroup(9, (1,), 30)))


def batcher(context=40, concurrency=4, chunk_tokens=16):
    return Batcher(LAYOUT, context, concurrency, chunk_tokens, CPU)


def table(*blocks, other=None):
    return list(blocks), list(other or [block + 100 for block in blocks])


def test_a_chunk_and_a_single_token_are_packed_one_after_the_other():
    rows = [
        Row([7, 8, 9], 6, table(5, 2, 8), sample=False),
        Row([3], 4, table(11, 12), sample=True),
    ]
    batch = batcher().build(rows).main
    assert batch.ids.tolist() == [[7, 8, 9, 3]]
    assert batch.positions.tolist() == [[6, 7, 8, 4]]
    assert batch.keep.tolist() == [3]
    assert batch.slots[0].tolist() == [2 * 4 + 2, 2 * 4 + 3, 8 * 4, 12 * 4]
    assert batch.slots[1].tolist() == [102 * 4 + 2, 102 * 4 + 3, 108 * 4, 112 * 4]
    assert batch.cu_tokens.tolist() == [0, 3, 4]
    assert batch.cu_lengths.tolist() == [0, 9, 14]
    assert batch.starts.tolist() == [6, 4]
    assert batch.lengths.tolist() == [9, 5]
    assert batch.tables[0].tolist() == [[5, 2, 8], [11, 12, 0]]
    assert batch.tables[1].tolist() == [[105, 102, 108], [111, 112, 0]]
    assert [(span.first, span.count, span.start, span.length) for span in batch.spans] == [
        (0, 3, 6, 9),
        (3, 1, 4, 5),
    ]
    assert (batch.max_count, batch.max_length, batch.decodes) == (3, 9, False)


def test_tensors_have_the_types_that_models_and_kernels_take():
    batch = batcher().build([Row([1], 0, table(3), sample=True)]).main
    longs = [batch.ids, batch.positions, batch.keep, *batch.slots]
    ints = [batch.cu_tokens, batch.cu_lengths, batch.starts, batch.lengths, *batch.tables]
    assert {x.dtype for x in longs} == {torch.int64}
    assert {x.dtype for x in ints} == {torch.int32}
    assert all(x.is_contiguous() for x in longs + ints)


@st.composite
def any_rows(draw):
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        start, count = draw(st.integers(0, 30)), draw(st.integers(1, 4))
        blocks = -(-(start + count) // 4) + draw(st.integers(0, 2))
        tables = tuple(draw(st.lists(st.integers(0, 29), min_size=blocks, max_size=blocks)) for _ in range(2))
        ids = draw(st.lists(st.integers(0, 2**40), min_size=count, max_size=count))
        rows.append(Row(ids, start, tables, draw(st.booleans())))
    return rows


@settings(max_examples=100, deadline=None)
@given(st.lists(any_rows(), min_size=1, max_size=4))
def test_every_token_has_its_place_whatever_was_built_before(steps):
    one = batcher()
    for rows in steps:
        batch = one.build(rows).main
        at = 0
        for number, row in enumerate(rows):
            assert batch.cu_tokens[number] == at
            for offset, token_id in enumerate(row.ids):
                position = row.start + offset
                assert batch.ids[0, at] == token_id
                assert batch.positions[0, at] == position
                for group in range(2):
                    slot = row.tables[group][position // 4] * 4 + position % 4
                    assert batch.slots[group][at] == slot
                at += 1
            for group in range(2):
                seen = batch.tables[group][number].tolist()
                blocks = row.tables[group]
                assert seen == [blocks[i] if i < len(blocks) else 0 for i in range(len(seen))]
        last = batch.cu_tokens[1:] - 1
        assert batch.keep.tolist() == [last[i] for i, row in enumerate(rows) if row.sample]


def test_rows_that_fill_a_batch_up_write_to_the_block_that_is_nobodys():
    rows = [Row([5], 9, table(3, 4, 6), sample=True)]
    batch = batcher().build(rows, padded_to=4).main
    assert batch.ids.tolist() == [[5, 0, 0, 0]]
    assert batch.positions.tolist() == [[9, 0, 0, 0]]
    assert batch.slots[0].tolist() == [6 * 4 + 1, 50 * 4, 50 * 4, 50 * 4]
    assert batch.slots[1].tolist() == [106 * 4 + 1, 30 * 4, 30 * 4, 30 * 4]
    assert batch.lengths.tolist() == [10, 1, 1, 1]
    assert batch.keep.tolist() == [0, 1, 2, 3]
    assert batch.tables[0].tolist() == [[3, 4, 6] + [0] * 7, *[[50] + [0] * 9] * 3]
    assert (batch.max_count, batch.max_length) == (1, 40), "recorded once, for any length there may be"


def test_padded_steps_of_one_size_lie_at_the_same_addresses():
    one = batcher()

    def addresses(rows):
        batch = one.build(rows, padded_to=2).main
        return [x.data_ptr() for x in (batch.ids, batch.keep, batch.lengths, *batch.slots, *batch.tables)]

    first = addresses([Row([5], 9, table(3, 4, 6), sample=True)])
    assert addresses([Row([5], 0, table(3), sample=False)] * 2) == first


def test_tables_may_be_longer_than_a_step_needs():
    batch = batcher().build([Row([1], 0, table(3, 4, 5, 6), sample=True)]).main
    assert batch.tables[0].tolist() == [[3]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "a step of 0 rows"),
        ([Row([1], 0, table(1), True)] * 5, "a step of 5 rows, 5 tokens; 4 and 16 may be"),
        ([Row([1] * 17, 0, table(*range(10)), True)], "a step of 1 rows, 17 tokens"),
        ([Row([], 0, table(1), True)], "0 tokens after 0"),
        ([Row([1, 1], 7, table(1, 2), True)], "2 tokens after 7: there are blocks for 8"),
        ([Row([1], 4, table(1, 2, other=[1]), True)], "1 tokens after 4: there are blocks for 4"),
        ([Row([1], 40, table(*range(12)), True)], "1 tokens after 40: there are blocks for 40"),
    ],
)
def test_what_a_step_cannot_hold_is_refused_before_anything_is_written(rows, message):
    with pytest.raises(ValueError, match=message):
        batcher().build(rows)


def test_views_of_many_forms_are_not_all_kept():
    one = batcher(chunk_tokens=64)
    for count in range(1, 40):
        batch = one.build([Row([count] * count, 0, table(*range(10)), sample=True)]).main
        assert batch.ids.tolist() == [[count] * count]
        assert len(one._views[CPU]._kept) <= FORMS_KEPT


def test_a_device_further_down_the_pipeline_gets_a_copy_once_a_step():
    """The meta device stands for a second GPU: copies to it are counted, not made."""
    one, other = batcher(), torch.device("meta")
    rows = [Row([5], 9, table(3, 4, 6), sample=True)]
    step = one.build(rows)
    assert step.on(other) is step.on(other)
    assert step.on(other).tables[0].device == other
    assert step.on(other).tables[0].shape == step.main.tables[0].shape
    assert step.on(CPU) is step.main
