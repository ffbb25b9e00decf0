from service.engine.answer import Answer
from service.engine.types import SamplingParams


def events_of(tokenizer, text, room=100, ids=None, **params):
    ids = tokenizer.encode(text, add_special_tokens=False) if ids is None else ids
    answer = Answer(SamplingParams(**{"max_tokens": 100, **params}), tokenizer, room)
    events = []
    for token in ids:
        events.append(answer.push(token))
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


def test_a_full_context_ends_with_length(tokenizer):
    events = events_of(tokenizer, "abcdefgh", room=2)
    assert (len(events), events[-1].finish_reason) == (2, "length")


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
