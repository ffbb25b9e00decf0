import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.stop_strings import StopStrings

stops_of = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4).map(tuple)


def run(stops, pieces):
    one = StopStrings(stops)
    shown = [one.push(piece) for piece in pieces]
    return "".join([*shown, one.flush()]), one.found


def test_text_before_a_stop_string_is_shown_and_the_stop_string_is_not():
    assert run(("###",), ["one ## two ###", " three"]) == ("one ## two ", True)


def test_a_stop_string_in_pieces_is_found():
    assert run(("\n\nUser:",), ["hi\n", "\nUs", "er", ": no"]) == ("hi", True)


def test_only_what_may_become_a_stop_string_is_held_back():
    one = StopStrings(("stop",))
    assert [one.push(piece) for piece in ("s", "to", "rm ", "sto")] == ["", "", "storm ", ""]
    assert one.flush() == "sto"


def test_a_match_that_begins_inside_a_failed_one_is_found():
    assert run(("aab",), ["a", "a", "a", "b", "c"]) == ("a", True)


def test_of_several_the_first_complete_one_wins():
    assert run(("late", "x"), ["text late"]) == ("te", True)


def test_of_those_that_end_together_the_longest_wins():
    assert run(("User", "\nUser"), ["hi\nUser"]) == ("hi", True)


def test_nothing_comes_after_a_match():
    one = StopStrings(("x",))
    assert (one.push("axb"), one.push("c"), one.flush()) == ("a", "", "")


@pytest.mark.parametrize("stops", [(), ("",)])
def test_without_a_stop_string_text_passes_at_once(stops):
    assert StopStrings(stops).push("anything") == "anything"


@given(stops_of, st.lists(st.text("abc", max_size=3)))
def test_the_result_does_not_depend_on_how_the_text_is_cut(stops, pieces):
    assert run(stops, pieces) == run(stops, list("".join(pieces)))


@given(stops_of, st.text("abc"))
def test_the_text_is_cut_where_the_first_complete_match_begins(stops, text):
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            assert run(stops, [text]) == (text[: end - max(map(len, matching))], True)
            return
    assert run(stops, [text]) == (text, False)


def test_what_may_not_end_passes_and_only_a_later_match_is_found():
    one = StopStrings(("ab",))
    assert [one.push("xab", may_end=False), one.push("yab"), one.found] == ["xab", "y", True]


def test_text_that_may_not_end_can_begin_a_match():
    one = StopStrings(("ab",))
    assert [one.push("xa", may_end=False), one.push("b"), one.found] == ["x", "", True]


@given(stops_of, st.text("abc"), st.text("abc"))
def test_the_end_is_the_first_match_that_is_complete_after_what_may_not_end(stops, before, after):
    one = StopStrings(stops)
    shown = one.push(before, may_end=False) + one.push(after) + one.flush()
    text = before + after
    ends = [end for end in range(len(before) + 1, len(text) + 1) if text[:end].endswith(stops)]
    if not stops or not ends:
        assert (shown, one.found) == (text, False)
    else:
        longest = max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))
        assert one.found
        assert shown == text[: ends[0] - longest]
