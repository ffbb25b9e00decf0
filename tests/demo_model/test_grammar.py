import random

import pytest

from demo_model.grammar import phrase


def every(pattern, values=None, tries=200):
    rng = random.Random(0)
    return {phrase(rng, pattern, values or {}) for _ in range(tries)}


def test_a_choice_is_one_of_its_parts_and_may_be_nothing():
    assert every("say [hi|hello|]") == {"say hi", "say hello", "say "}


def test_choices_nest():
    assert every("[a|b[c|d]]") == {"a", "bc", "bd"}


def test_a_list_is_picked_from_a_function_is_called_and_both_may_give_a_pattern():
    values = {"who": ["you", "[we|they]"], "n": lambda: "7", "name": "Ana"}
    assert every("{name} {n} {who}", values) == {"Ana 7 you", "Ana 7 we", "Ana 7 they"}


def test_a_value_that_is_not_there_is_an_error():
    with pytest.raises(KeyError, match="nobody"):
        phrase(random.Random(0), "{nobody}", {})
