import pytest

from demo_model.corpus import generate
from demo_model.evaluate import BAR, HeldOut, Question, holds, passed, read


def test_there_are_at_least_sixty_questions_in_both_languages():
    questions = read()
    assert len(questions) >= 60
    assert {question.lang for question in questions} == {"en", "zh"}
    assert all(question.must for question in questions)


@pytest.mark.parametrize(
    ("answer", "wanted", "right"),
    [
        ("It is 7.", "7", True),
        ("It is 17.", "7", False),
        ("It is 71.", "7", False),
        ("Your name is ZORBLAT", "zorblat", True),
        ("Goodbye!", "bye|see you", True),
        ("Hello!", "bye|see you", False),
    ],
)
def test_an_answer_holds_one_of_the_options_in_any_case_and_no_longer_number(answer, wanted, right):
    assert holds(answer, wanted) is right


def test_what_is_asked_and_the_names_in_it_are_kept_out_of_training():
    held_out = HeldOut([Question("tell", "en", ("I am Quexel.",), ("quexel",), names=("Quexel",))])
    assert held_out.is_in([{"role": "user", "content": "i am quexel"}])
    assert held_out.is_in([{"role": "assistant", "content": "Hello, QUEXEL!"}])
    assert not held_out.is_in([{"role": "user", "content": "I am Quexelia."}])
    assert not held_out.is_in([{"role": "assistant", "content": "I am."}])


def test_no_question_is_in_the_corpus():
    held_out = HeldOut(read())
    assert not any(held_out.is_in(dialogue) for dialogue in generate(1, 3000).dialogues)


def test_the_corpus_has_the_hash_of_what_is_in_it():
    assert generate(1, 50).sha256 == generate(1, 50).sha256 != generate(2, 50).sha256


@pytest.mark.parametrize("fault", [{"share": BAR - 0.01}, {"loops": 1}, {"broken_utf8": 1}])
def test_one_loop_one_broken_character_or_too_few_right_answers_fail(fault):
    good = {"share": BAR, "loops": 0, "broken_utf8": 0}
    assert passed(good)
    assert not passed({**good, **fault})
