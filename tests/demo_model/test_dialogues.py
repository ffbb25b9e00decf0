import re

import pytest

from demo_model.dialogues import dialogues, normalised

SUM = re.compile(r"(\d+) \+ (\d+) = (\d+)")


@pytest.fixture(scope="module")
def some():
    return list(dialogues(seed=3, count=1500))


def test_the_same_seed_gives_the_same_dialogues():
    assert list(dialogues(5, 20)) == list(dialogues(5, 20))
    assert list(dialogues(5, 20)) != list(dialogues(6, 20))


def test_turns_alternate_and_end_with_an_answer(some):
    for dialogue in some:
        roles = [message["role"] for message in dialogue if message["role"] != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in dialogue)


def test_no_pattern_is_left_unfilled(some):
    for dialogue in some:
        assert not any(re.search(r"\{\w+\}|\|", message["content"]) for message in dialogue)


def test_every_sum_is_right_and_at_most_twenty(some):
    said = (turn["content"] for dialogue in some for turn in dialogue if turn["role"] == "assistant")
    sums = [tuple(map(int, found.groups())) for text in said if (found := SUM.search(text))]
    assert len(sums) > 100
    assert all(a + b == total <= 20 for a, b, total in sums)


def test_a_name_that_is_asked_for_was_told_in_these_letters(some):
    asked = 0
    for dialogue in some:
        for at, message in enumerate(dialogue):
            if found := re.fullmatch(r"Your name is (.+)\.", message["content"]):
                said = "".join(turn["content"] for turn in dialogue[:at] if turn["role"] == "user")
                name = found[1]  # a Chinese one may have been told in two parts: 姓盘，名曦磊
                assert name in said if name.isascii() else all(char in said for char in name)
                asked += 1
    assert asked > 20


def test_both_languages_are_spoken(some):
    chinese = sum(any("\u4e00" <= char <= "\u9fff" for char in dialogue[-1]["content"]) for dialogue in some)
    assert 0.35 < chinese / len(some) < 0.65


def test_messages_that_say_the_same_are_equal_once_normalised():
    assert normalised("What's  3 + 4?") == normalised("whats 3+4") == "whats3+4"
    assert normalised("３＋４") == "3+4"
