"""loader/pool.py: how the KV cache is cut into blocks, and what they take."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.footprint import LayerCache
from loader.placement import Setting
from loader.pool import PoolRule, rule_for

FULL, WIDE, NARROW = (LayerCache("full", 100), LayerCache("sliding", 60, 512), LayerCache("sliding", 60, 128))


def test_blocks_are_small_on_the_cpu_and_pages_of_flash_attention_on_a_gpu():
    assert rule_for([FULL], True, "cpu").block_tokens == 32
    assert rule_for([FULL], True, "cuda:1").block_tokens == 256


def test_there_is_a_group_for_each_window_and_the_one_that_sees_the_furthest_comes_first():
    layout = PoolRule((NARROW, FULL, WIDE, FULL, NARROW), 32, True).layout(Setting(64, 1000, 2))
    assert [(group.window, group.layers) for group in layout.groups] == [
        (None, (1, 3)), (512, (2,)), (128, (0, 4)),
    ]  # fmt: skip


def test_without_a_number_of_blocks_there_are_those_of_one_sequence():
    rule = PoolRule((FULL, NARROW), 32, True)
    layout = rule.layout(Setting(64, 1000, 4))
    assert [group.blocks for group in layout.groups] == [32, 4 * 7]  # 7: 127 + 64 tokens, and a part of one
    assert layout.tokens == 1024
    alone = rule.layout(Setting(64, 1000, 1))
    assert [group.blocks for group in alone.groups] == [32, 7]


def test_a_group_with_a_window_has_no_more_blocks_than_the_first_nor_than_all_rows_can_hold():
    rule = PoolRule((FULL, NARROW), 32, True)
    for blocks, sliding in ((32, 14), (200, 14)):
        assert rule.layout(Setting(64, 1000, 2, blocks)).groups[1].blocks == sliding
    assert rule.layout(Setting(64, 1000, 100, 40)).groups[1].blocks == 40


def test_each_group_has_one_block_more_for_rows_that_only_fill_a_batch_up():
    rule, setting = PoolRule((FULL, NARROW, NARROW), 32, True), Setting(64, 1000, 1)
    assert rule.layer_bytes(FULL, setting) == 33 * 32 * 100
    assert rule.layer_bytes(NARROW, setting) == 8 * 32 * 60
    assert rule.n_bytes(setting) == 33 * 32 * 100 + 2 * 8 * 32 * 60


def test_a_model_that_runs_one_at_a_time_is_one_group_and_its_caches_bytes():
    rule, setting = (
        PoolRule((LayerCache("linear", 0, None, 7), NARROW, FULL), 32, False),
        Setting(64, 1000, 1),
    )
    (group,) = rule.layout(setting).groups
    assert (group.window, group.layers, group.blocks) == (None, (0, 1, 2), 32)
    assert rule.n_bytes(setting) == 7 + (128 + 64) * 60 + 1000 * 100


@given(
    st.lists(st.sampled_from([FULL, WIDE, NARROW]), min_size=1, max_size=5), st.integers(1, 300),
    st.integers(1, 3000), st.integers(1, 20), st.integers(1, 100),
)  # fmt: skip
def test_every_group_holds_one_sequence_and_more_blocks_never_make_it_smaller(
    layers, chunk, context, rows, more
):
    rule = PoolRule(tuple(layers), 32, True)
    small = Setting(chunk, context, rows)
    large = Setting(chunk, context, rows, rule.blocks(small) + more)
    for one, other in zip(rule.layout(small).groups, rule.layout(large).groups, strict=True):
        assert one.blocks_for(context, chunk, 32) <= one.blocks <= other.blocks
    assert rule.n_bytes(small) < rule.n_bytes(large) or rows == 1


@pytest.mark.parametrize("context", [1, 31, 32, 33])
def test_a_last_block_that_is_not_full_is_a_block(context):
    assert PoolRule((FULL,), 32, True).least_blocks(context, 64) == 1 + (context > 32)
