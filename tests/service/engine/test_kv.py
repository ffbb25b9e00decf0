import pytest

from service.engine.kv import KvSlots


def test_every_slot_is_lent_once_and_none_beyond():
    slots = KvSlots(3, 100)
    assert sorted(slots.take() for _ in range(3)) == [0, 1, 2]
    assert (slots.take(), slots.free) == (None, 0)


def test_tokens_count_while_their_slot_is_held():
    slots = KvSlots(2, 100)
    first, second = slots.take(), slots.take()
    slots.fill(first, 10)
    slots.fill(second, 5)
    slots.fill(first, 1)
    assert slots.tokens_used == 16
    slots.give_back(first)
    assert slots.tokens_used == 5
    assert slots.take() == first
    assert slots.tokens_used == 5


def test_a_slot_cannot_be_given_back_twice():
    slots = KvSlots(2, 100)
    slot = slots.take()
    slots.give_back(slot)
    with pytest.raises(KeyError):
        slots.give_back(slot)
