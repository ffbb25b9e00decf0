from service.engine.answer import Answer
from service.engine.channel import Chosen
from service.engine.types import Logprobs, SamplingParams


def events_of(tokenizer, text, ids=None, **params):
    """As the engine's thread sends them: it knows token ids and limits, and goes on beyond stop strings."""
    params = SamplingParams(**{"max_tokens": 100, **params})
    ids = tokenizer.encode(text, add_special_tokens=False) if ids is None else ids
    answer, events = Answer(params, tokenizer), []
    for count, token in enumerate(ids, start=1):
        ended = token in params.stop_token_ids
        reason = "stop" if ended else "length" if count == params.max_tokens else None
        events.append(answer.push(Chosen(token, reason, Logprobs(-count), 3)))
        if events[-1].finish_reason:
            break
    return events


def text_of(events):
    return "".join(event.text for event in events)


def test_an_end_token_ends_with_stop_is_counted_and_not_shown(tokenizer):
    end = tokenizer.eos_token_id
    ids = [*tokenizer.encode("hi"), end, *tokenizer.encode("more")]
    events = events_of(tokenizer, "", ids=ids, stop_token_ids=frozenset({end}))
    assert (text_of(events), events[-1].finish_reason) == ("hi", "stop")
    assert events[-1].completion_tokens == len(events) == ids.index(end) + 1


def test_an_ordinary_token_may_be_an_end_token_too(tokenizer):
    (bang,) = tokenizer.encode("!")
    events = events_of(tokenizer, "hi!no", stop_token_ids=frozenset({bang}))
    assert (text_of(events), events[-1].finish_reason) == ("hi", "stop")


def test_max_tokens_ends_with_length(tokenizer):
    events = events_of(tokenizer, "abcdefgh", max_tokens=3)
    assert (len(events), events[-1].finish_reason) == (3, "length")


def test_a_stop_string_ends_with_stop_and_counts_its_tokens(tokenizer):
    events = events_of(tokenizer, "abc##def", stop=("##",))
    assert (text_of(events), events[-1].finish_reason) == ("abc", "stop")
    assert [event.completion_tokens for event in events] == list(range(1, len(events) + 1))


def test_a_stop_string_in_the_last_token_allowed_is_a_stop(tokenizer):
    events = events_of(tokenizer, "ab#", max_tokens=3, stop=("#",))
    assert (text_of(events), events[-1].finish_reason) == ("ab", "stop")


def test_what_was_held_back_comes_with_the_end(tokenizer):
    events = events_of(tokenizer, "ab#", max_tokens=3, stop=("##",))
    assert (text_of(events), events[-1].finish_reason) == ("ab#", "length")


def test_half_a_character_at_the_end_is_shown_as_broken(tokenizer):
    events = events_of(tokenizer, "a🦊", max_tokens=3)
    assert [event.text for event in events] == ["a", "", "\ufffd"]


def test_a_stop_string_that_only_the_flushed_half_character_completes_is_found(tokenizer):
    events = events_of(tokenizer, "a🦊", max_tokens=3, stop=("\ufffd",))
    assert (text_of(events), events[-1].finish_reason) == ("a", "stop")


def test_what_the_engine_computed_beyond_a_stop_string_is_not_shown(tokenizer):
    events = events_of(tokenizer, "ab#cdef", stop=("#",), max_tokens=6)
    assert (text_of(events), len(events)) == ("ab", 3)


def test_until_min_tokens_stop_strings_are_text(tokenizer):
    events = events_of(tokenizer, "a#b#c#d", stop=("#",), min_tokens=4)
    assert (text_of(events), events[-1].completion_tokens, events[-1].finish_reason) == ("a#b#c", 6, "stop")


def test_a_stop_string_that_begins_before_min_tokens_and_is_complete_after_it_ends(tokenizer):
    events = events_of(tokenizer, "ab##cd", stop=("##",), min_tokens=3)
    assert (text_of(events), events[-1].finish_reason) == ("ab", "stop")


def test_logprobs_and_cached_tokens_go_with_each_token(tokenizer):
    events = events_of(tokenizer, "abc")
    assert [event.logprobs.chosen for event in events] == [-1, -2, -3]
    assert {event.cached_tokens for event in events} == {3}
