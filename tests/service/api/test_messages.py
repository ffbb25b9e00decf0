import pytest

from service.api import messages
from service.api.errors import ApiError
from service.api.schemas import ChatMessage


def plain(*turns):
    return messages.plain([ChatMessage.model_validate(turn) for turn in turns])


def test_text_parts_are_joined_with_nothing_between_them():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert plain({"role": "user", "content": parts}) == [{"role": "user", "content": "a b"}]


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_the_four_roles_pass(role):
    assert plain({"role": role, "content": "x"}) == [{"role": role, "content": "x"}]


@pytest.mark.parametrize(
    ("turn", "param", "word"),
    [
        ({"role": "tool", "content": "x"}, "messages.1.role", "'tool'"),
        ({"role": "wizard", "content": "x"}, "messages.1.role", "'wizard'"),
        ({"role": "assistant", "content": None}, "messages.1.content", "required"),
        ({"role": "user"}, "messages.1.content", "required"),
        (
            {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
            "messages.1.tool_calls",
            "not supported",
        ),
        (
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}],
            },
            "messages.1.content.1.type",
            "'image_url'",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.1.content.0.text", "required"),
    ],
)
def test_what_is_not_understood_is_refused_with_its_place(turn, param, word):
    with pytest.raises(ApiError) as refused:
        plain({"role": "user", "content": "hi"}, turn)
    assert refused.value.param == param
    assert refused.value.status == 400
    assert word in str(refused.value)


def test_the_empty_lists_and_nulls_that_clients_send_back_pass():
    turn = {"role": "assistant", "content": "x", "tool_calls": [], "refusal": None, "audio": None}
    assert plain(turn) == [{"role": "assistant", "content": "x"}]
