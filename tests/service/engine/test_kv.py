import pytest

from loader.kv_layout import KvGroup, KvLayout
from service.engine.kv import KvPool

BLOCK = 4


def pool(*groups, chunk=8, prefix_reuse=True):
    """`groups` are (window, blocks)."""
    layout = KvLayout(BLOCK, tuple(KvGroup(window, (0,), blocks) for window, blocks in groups))
    return KvPool(layout, chunk, prefix_reuse)


def compute(kv, ids, chunk=8):
    """What a sequence does that reads all of `ids`: its holding, and how many of them it found."""
    holding = kv.holding()
    found = kv.find(holding, ids)
    kv.take(holding, found)
    for end in [*range(found + chunk, len(ids), chunk), len(ids)]:
        assert kv.grow(holding, end)
        kv.wrote(holding, ids, end)
    return holding, found


def numbers(count, seed=0):
    return [seed * 1000 + place for place in range(count)]


def test_tables_cover_the_tokens_with_blocks_that_nobody_else_holds():
    kv = pool((None, 6))
    first, second = kv.holding(), kv.holding()
    assert kv.grow(first, 5)
    assert kv.grow(second, 12)
    held = [*first.tables[0], *second.tables[0]]
    assert [len(first.tables[0]), len(second.tables[0])] == [2, 3]
    assert len(set(held)) == 5
    assert set(held) <= set(range(6))
    assert kv.grow(first, 8)
    assert kv.blocks_used == 5


def test_a_growth_that_does_not_fit_changes_nothing():
    kv = pool((None, 9), (6, 3))
    holding = kv.holding()
    assert kv.grow(holding, 8)
    assert not kv.grow(holding, 17)
    assert [len(table) for table in holding.tables] == [2, 2]
    assert kv.room(holding) == 12
    assert kv.grow(holding, 12)


def test_statistics_count_what_is_held_and_not_what_is_only_kept():
    kv = pool((None, 6), (6, 4))
    assert (kv.blocks_total, kv.blocks_used, kv.tokens_used) == (10, 0, 0)
    holding, _ = compute(kv, numbers(8))
    assert (kv.blocks_used, kv.tokens_used) == (4, 8)
    kv.release(holding)
    assert (kv.blocks_used, kv.tokens_used) == (0, 0)
    other, found = compute(kv, numbers(9))
    assert found == 8
    assert kv.tokens_used == 12
    kv.release(other)


def test_a_prefix_is_found_in_whole_blocks_and_after_its_sequence_has_ended():
    kv = pool((None, 8))
    first, _ = compute(kv, numbers(11))
    blocks = list(first.tables[0])
    kv.release(first)
    second, found = compute(kv, [*numbers(10), 77, 78])
    assert found == 8
    assert second.tables[0][:2] == blocks[:2]


def test_the_last_token_is_never_found():
    kv = pool((None, 8))
    compute(kv, numbers(8))
    assert kv.find(kv.holding(), numbers(8)) == 4
    assert kv.find(kv.holding(), numbers(9)) == 8
    assert kv.find(kv.holding(), numbers(4)) == 0
    assert kv.find(kv.holding(), numbers(1)) == 0


def test_the_same_tokens_after_others_are_not_the_same_block():
    kv = pool((None, 8))
    compute(kv, [*numbers(4, seed=1), *numbers(4)])
    assert kv.find(kv.holding(), [*numbers(4, seed=2), *numbers(4), 9]) == 0
    assert kv.find(kv.holding(), [*numbers(4), 9]) == 0


def test_a_block_that_is_not_full_is_not_found():
    kv = pool((None, 8))
    holding = kv.holding()
    kv.grow(holding, 8)
    kv.wrote(holding, numbers(8), 7)
    assert kv.find(kv.holding(), numbers(9)) == 4
    kv.wrote(holding, numbers(8), 8)
    assert kv.find(kv.holding(), numbers(9)) == 8


def test_what_was_not_written_is_not_found():
    kv = pool((None, 8))
    kv.grow(kv.holding(), 8)
    assert kv.find(kv.holding(), numbers(9)) == 0


def test_a_shared_block_is_held_until_the_last_holder_leaves():
    kv = pool((None, 4))
    first, _ = compute(kv, numbers(8))
    second, found = compute(kv, numbers(9))
    assert (found, kv.blocks_used) == (8, 3)
    kv.release(first)
    assert kv.blocks_used == 3
    assert not kv.grow(kv.holding(), 8)
    kv.release(second)
    assert kv.blocks_used == 0


def test_two_that_compute_the_same_at_once_keep_a_block_each():
    kv = pool((None, 4))
    first, second = kv.holding(), kv.holding()
    for holding in (first, second):
        kv.grow(holding, 4)
        kv.wrote(holding, numbers(4), 4)
    assert first.tables[0] != second.tables[0]
    kv.release(second)
    third, found = compute(kv, numbers(5))
    assert found == 4
    assert third.tables[0][0] == first.tables[0][0]


def test_the_longest_unused_is_evicted_first_and_its_end_before_its_beginning():
    kv = pool((None, 5))
    for seed in (1, 2):
        kv.release(compute(kv, numbers(8, seed))[0])
    holding = kv.holding()
    kv.grow(holding, 8)  # the one that was never used, and one more
    assert kv.find(kv.holding(), numbers(9, seed=1)) == 4
    assert kv.find(kv.holding(), numbers(9, seed=2)) == 8
    kv.grow(holding, 12)
    assert kv.find(kv.holding(), numbers(9, seed=1)) == 0
    assert kv.find(kv.holding(), numbers(9, seed=2)) == 8


def test_being_found_again_counts_as_use():
    kv = pool((None, 5))
    for seed in (1, 2):
        kv.release(compute(kv, numbers(8, seed))[0])
    kv.release(compute(kv, numbers(9, seed=1))[0])
    kv.grow(kv.holding(), 12)
    assert kv.find(kv.holding(), numbers(9, seed=1)) == 8
    assert kv.find(kv.holding(), numbers(9, seed=2)) == 0


def test_nothing_is_found_without_prefix_reuse():
    kv = pool((None, 8), prefix_reuse=False)
    kv.release(compute(kv, numbers(8))[0])
    assert kv.find(kv.holding(), numbers(9)) == 0


def test_what_is_broken_is_not_found_by_anyone_and_who_holds_it_keeps_it():
    """With blocks of a sliding group that were given back before, and blocks that were found."""
    kv = pool((None, 20), (5, 20))
    first, _ = compute(kv, numbers(8))
    second, found = compute(kv, numbers(24))
    other, _ = compute(kv, numbers(12, seed=1))
    assert found == 8
    assert kv.find(kv.holding(), numbers(25)) == 24
    held, used = list(first.tables[0]), kv.blocks_used
    kv.unpublish(second)
    assert kv.blocks_used == used
    assert [kv.find(kv.holding(), numbers(n)) for n in (5, 9, 13, 25)] == [0] * 4
    assert kv.find(kv.holding(), numbers(13, seed=1)) == 12
    kv.release(second)
    assert first.tables[0] == held
    third = kv.holding()
    assert kv.grow(third, kv.room(third))
    assert not {*third.tables[0]} & {*first.tables[0], *other.tables[0]}
    for holding in (first, other, third):
        kv.release(holding)
    assert kv.blocks_used == 0


@pytest.mark.parametrize("window", [1, 2, 5, 6, 9])
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_a_sliding_group_keeps_what_the_next_token_sees_and_no_block_more(window, prefix_reuse):
    kv = pool((None, 20), (window, 20), prefix_reuse=prefix_reuse)
    holding = kv.holding()
    for tokens in range(1, 41):
        kv.grow(holding, tokens)
        kv.wrote(holding, numbers(40), tokens)
        whole, sliding = holding.tables
        first = max(0, tokens - window + 1) // BLOCK
        assert len(whole) == len(sliding) == -(-tokens // BLOCK)
        assert sliding[:first] == [0] * first
        kept = len(sliding) - first
        assert kv.blocks_used == len(whole) + kept
        assert kept <= KvGroup(window, (), 0).blocks_for(tokens, 1, BLOCK)
    kv.release(holding)
    assert kv.blocks_used == 0


def test_a_prefix_counts_while_a_sliding_group_has_the_blocks_of_its_window():
    kv = pool((None, 20), (6, 7))
    kv.release(compute(kv, numbers(20))[0])  # in the sliding group 3 and 4 were held, 0 to 2 idle
    for tokens in (8, 12, 16, 20):
        assert kv.find(kv.holding(), numbers(tokens + 1)) == tokens
    filler = kv.holding()
    kv.grow(filler, 16)  # takes the two never used, and blocks 0 and 1 of the sliding group
    assert kv.find(kv.holding(), numbers(5)) == 0
    assert kv.find(kv.holding(), numbers(9)) == 0
    assert kv.find(kv.holding(), numbers(13)) == 0  # token 12 still sees token 7, in block 1
    assert kv.find(kv.holding(), numbers(17)) == 16
    holding = kv.holding()
    kv.take(holding, kv.find(holding, numbers(17)))
    assert holding.tables[1][:2] == [0, 0]
    assert len(holding.tables[0]) == len(holding.tables[1]) == 4
    kv.release(holding)


def test_models_whose_layers_all_slide_find_a_prefix_whose_beginning_is_gone():
    kv = pool((5, 6))
    kv.release(compute(kv, numbers(16))[0])
    kv.grow(kv.holding(), 4 * 4)  # the two never used and the two oldest
    assert kv.find(kv.holding(), numbers(9)) == 0
    assert kv.find(kv.holding(), numbers(17)) == 16


def test_fits_counts_what_would_be_shared_and_leaves_a_spare_block():
    kv = pool((None, 6))
    first, _ = compute(kv, numbers(12))
    newcomer = kv.holding()
    assert kv.fits(newcomer, 0, 12, spare=False)
    assert not kv.fits(newcomer, 0, 12, spare=True)
    assert not kv.fits(newcomer, 0, 13, spare=False)
    found = kv.find(newcomer, numbers(20))
    assert found == 12
    assert kv.fits(newcomer, found, 20, spare=True)
    kv.release(first)  # from now on, what is found takes its blocks from the available ones
    assert kv.fits(newcomer, found, 20, spare=True)
    assert not kv.fits(newcomer, found, 21, spare=True)


def test_a_sliding_group_needs_no_more_than_its_window_and_a_chunk():
    kv = pool((None, 30), (5, 3), chunk=4)
    assert kv.fits(kv.holding(), 0, 100, spare=False)
    assert not kv.fits(kv.holding(), 0, 100, spare=True)


def test_tables_that_a_step_still_looks_at_survive_the_release():
    kv = pool((None, 8))
    holding, _ = compute(kv, numbers(8))
    table = holding.tables[0]
    before = list(table)
    kv.release(holding)
    kv.grow(holding, 4)
    assert table == before
    assert len(holding.tables[0]) == 1
