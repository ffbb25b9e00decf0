"""transformers' own dynamic layers are the oracle. Whole models over these caches are in test_runner.py."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from service.engine.cache import MOVE_TOKENS, CacheOverflow, FixedCache, FixedLayer, FixedSlidingLayer

HEADS, HEAD_DIM = 2, 4


def states(first, count, dtype=torch.float32):
    """Keys [1, heads, count, head_dim], no two numbers the same; values are their negatives."""
    keys = torch.arange(count * HEADS * HEAD_DIM).view(1, count, HEADS, HEAD_DIM).transpose(1, 2)
    keys = (keys + first * HEADS * HEAD_DIM).to(dtype)
    return keys, -keys


def feed(layer, steps, first=0):
    """Give the layer `steps` (numbers of new tokens) one after the other; what each of them saw."""
    for count in steps:
        yield layer.get_mask_sizes(count), layer.update(*states(first, count))
        first += count


def assert_same(mine, theirs, steps, first=0):
    for step, (got, want) in enumerate(
        zip(feed(mine, steps, first), feed(theirs, steps, first), strict=True)
    ):
        assert got[0] == want[0], step
        for ours, reference in zip(got[1], want[1], strict=True):
            assert torch.equal(ours, reference), step
        assert mine.get_seq_length() == theirs.get_seq_length()


def full():
    return FixedLayer(32)


def window():
    return FixedSlidingLayer(20, 32)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=30))
def test_full_attention_sees_what_the_dynamic_layer_sees(steps):
    assert_same(FixedLayer(sum(steps) or 1), DynamicLayer(), steps)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.integers(1, 9), st.data())
def test_a_window_sees_what_the_dynamic_layer_sees_however_often_it_has_slid(window, chunk, data):
    steps = data.draw(st.lists(st.integers(1, chunk), max_size=80))
    assert_same(FixedSlidingLayer(window, window + chunk), DynamicSlidingWindowLayer(window), steps)


@pytest.mark.parametrize("window", [MOVE_TOKENS - 1, MOVE_TOKENS, MOVE_TOKENS + 1, 3 * MOVE_TOKENS + 5])
def test_a_window_that_is_moved_in_overlapping_pieces_stays_in_order(window):
    steps = [7] * (3 * window // 7)
    assert_same(FixedSlidingLayer(window, window + 7), DynamicSlidingWindowLayer(window), steps)


def test_a_chunk_may_be_longer_than_the_window():
    assert_same(FixedSlidingLayer(4, 4 + 16), DynamicSlidingWindowLayer(4), [16, 16, 1, 1, 1, 16, 3])


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [(FixedLayer(8), DynamicLayer()), (FixedSlidingLayer(5, 8), DynamicSlidingWindowLayer(5))],
)
def test_what_a_model_asks_of_a_layer_is_answered_as_the_dynamic_one_answers(mine, theirs):
    assert mine.is_sliding == theirs.is_sliding
    assert mine.get_max_length() == theirs.get_max_length()
    assert mine.is_initialized == theirs.is_initialized
    assert mine.get_mask_sizes(3) == theirs.get_mask_sizes(3)
    for layer in (mine, theirs):
        layer.update(*states(0, 3))
    assert mine.is_initialized == theirs.is_initialized
    for layer in (mine, theirs):
        layer.reset()
    assert mine.is_initialized == theirs.is_initialized
    assert mine.get_seq_length() == theirs.get_seq_length() == 0


def test_one_token_too_many_overflows_and_changes_nothing():
    layer = FixedLayer(10)
    layer.update(*states(0, 8))
    with pytest.raises(CacheOverflow, match="11 tokens do not fit a KV cache of 10") as caught:
        layer.update(*states(8, 3))
    assert (caught.value.tokens, caught.value.capacity) == (11, 10)
    assert layer.get_seq_length() == 8
    keys, values = layer.update(*states(8, 2))
    assert torch.equal(keys, states(0, 10)[0])
    assert torch.equal(values, states(0, 10)[1])


def test_a_window_takes_tokens_without_end_but_no_chunk_longer_than_it_was_made_for():
    layer = FixedSlidingLayer(6, 6 + 4)
    for at in range(0, 400, 4):
        layer.update(*states(at, 4))
    with pytest.raises(CacheOverflow) as caught:
        layer.update(*states(400, 6))
    assert (caught.value.tokens, caught.value.capacity) == (5 + 6, 10)
    assert layer.get_seq_length() == 400
    assert torch.equal(layer.update(*states(400, 2))[0], states(395, 7)[0])


@pytest.mark.parametrize("make", [full, window], ids=["full", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_there_from_the_first_token_on_and_never_change(make, dtype):
    layer = make()
    assert layer.n_bytes == 0
    for at in range(32):
        keys, values = layer.update(*states(at, 1, dtype))
        assert keys.dtype == values.dtype == dtype
        assert layer.n_bytes == 2 * HEADS * 32 * HEAD_DIM * dtype.itemsize
    layer.reset()
    assert layer.n_bytes == 2 * HEADS * 32 * HEAD_DIM * dtype.itemsize


@pytest.mark.parametrize("make", [full, window], ids=["full", "window"])
def test_a_reset_keeps_the_memory_and_forgets_the_tokens(make):
    layer = make()
    before = [store.data_ptr() for store in layer.update(*states(0, 30))]
    layer.reset()
    after = layer.update(*states(500, 1))
    assert [store.data_ptr() for store in after] == before
    assert torch.equal(after[0], states(500, 1)[0])
    assert torch.equal(after[1], states(500, 1)[1])


def test_after_a_reset_a_window_slides_as_a_new_one():
    layer = FixedSlidingLayer(5, 8)
    list(feed(layer, [3] * 9))
    layer.reset()
    assert_same(layer, DynamicSlidingWindowLayer(5), [2, 3, 1, 3, 3, 3], first=100)


@pytest.mark.parametrize("length", [0, 1, 4, 5, 7, 8, 9, 40])
def test_after_a_seek_masks_and_positions_are_those_of_a_cache_that_has_seen_as_much(length):
    mine, theirs = FixedSlidingLayer(5, 8), DynamicSlidingWindowLayer(5)
    mine.update(*states(0, 1))
    mine.reset()
    list(feed(theirs, [1] * length))
    mine.seek(length)
    assert mine.get_seq_length() == theirs.get_seq_length() == length
    for at, count in ((length, 2), (length + 2, 1), (length + 3, 3), (length + 6, 3)):
        assert mine.get_mask_sizes(count) == theirs.get_mask_sizes(count)
        got, want = mine.update(*states(at, count))[0], theirs.update(*states(at, count))[0]
        assert got.shape == want.shape
        assert torch.equal(got[:, :, -count:], want[:, :, -count:])
    assert torch.equal(got, want), "by now nothing is left of what was pretended"


def test_a_seek_to_the_end_of_a_full_layer_leaves_room_for_what_is_left_and_no_more():
    layer = FixedLayer(10)
    layer.update(*states(0, 1))
    layer.seek(9)
    assert layer.get_mask_sizes(1) == (10, 0)
    assert layer.update(*states(9, 1))[0].shape[2] == 10
    with pytest.raises(CacheOverflow):
        layer.update(*states(10, 1))


def config(family, *kinds):
    return AutoConfig.for_model(family, num_hidden_layers=len(kinds), layer_types=list(kinds))


@pytest.fixture(scope="module")
def mixed():
    """A config with sliding and full layers by turns; the window is 9 tokens."""
    found = config("gemma3_text", *["sliding_attention", "full_attention"] * 2)
    found.sliding_window = 9
    return found


def test_a_cache_has_the_kinds_of_layers_that_the_config_asks_for(mixed):
    kinds = [type(layer) for layer in FixedCache(mixed, context=64, chunk_tokens=8).layers]
    assert kinds == [FixedSlidingLayer, FixedLayer] * 2
    linear = config("qwen3_5_text", *["linear_attention", "full_attention"] * 2)
    hybrid, dynamic = FixedCache(linear, 64, 8), DynamicCache(config=linear)
    assert [type(layer) for layer in hybrid.layers] == [type(dynamic.layers[0]), FixedLayer] * 2
    assert hybrid.seekable


def test_a_window_takes_no_more_room_than_the_context(mixed):
    def room(context, chunk_tokens):
        return [layer.capacity for layer in FixedCache(mixed, context, chunk_tokens).layers[:2]]

    assert room(context=64, chunk_tokens=8) == [9 + 8, 64]
    assert room(context=12, chunk_tokens=8) == [12, 12]


def test_a_whole_cache_counts_its_bytes_once_and_keeps_them_over_seek_and_reset(mixed):
    cache = FixedCache(mixed, context=64, chunk_tokens=8)
    assert cache.n_bytes == 0
    for index in range(4):
        cache.update(*states(0, 8), index)
    tokens = 2 * (9 + 8) + 2 * 64
    assert cache.n_bytes == 2 * HEADS * HEAD_DIM * 4 * tokens
    cache.seek(63)
    assert [layer.get_seq_length() for layer in cache.layers] == [63] * 4
    for index in range(4):
        cache.update(*states(63, 1), index)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.n_bytes == 2 * HEADS * HEAD_DIM * 4 * tokens


def test_a_copy_of_a_cache_shares_no_memory_with_it(mixed):
    first = FixedCache(mixed, context=64, chunk_tokens=8)
    for index in range(4):
        first.update(*states(0, 1), index)
    first.reset()
    second = copy.deepcopy(first)
    ours = first.update(*states(7, 2), 1)[0]
    second.update(*states(900, 2), 1)
    assert torch.equal(ours, states(7, 2)[0])
    assert second.n_bytes == first.n_bytes


def test_what_is_hidden_by_a_mask_is_a_number():
    """Attention multiplies hidden keys by 0, and NaN times 0 is NaN."""
    layer = FixedLayer(64)
    layer.update(*states(0, 1))
    layer.seek(60)
    keys, values = layer.update(*states(60, 4))
    assert not keys.isnan().any()
    assert not values.isnan().any()
    assert (keys[:, :, 1:60] == 0).all()
