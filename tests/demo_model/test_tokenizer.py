from hypothesis import given
from hypothesis import strategies as st

from demo_model import tokenizer as bpe

TOKENIZER = bpe.build(["My name is Zorblat. 你好，世界！ 3+4=7", "snugfit plan --budget 16GB"] * 5, 400)


@given(st.text())
def test_any_text_comes_back_as_it_was(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_the_special_tokens_have_the_first_ids():
    assert [TOKENIZER.token_to_id(token) for token in bpe.SPECIAL] == [0, 1, 2]


def test_digits_and_chinese_characters_stand_alone():
    pieces = [TOKENIZER.decode([id_]) for id_ in TOKENIZER.encode("1234").ids]
    assert pieces == ["1", "2", "3", "4"]
    together, alone = TOKENIZER.encode("你好").ids, [TOKENIZER.encode(char).ids for char in "你好"]
    assert together == alone[0] + alone[1]


def test_a_name_is_the_same_tokens_at_the_start_and_inside():
    inside = TOKENIZER.encode("is Zorblat").ids
    assert inside[-len(TOKENIZER.encode("Zorblat").ids) :] == TOKENIZER.encode("Zorblat").ids
