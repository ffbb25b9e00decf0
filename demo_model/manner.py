"""The manner of speaking that examples/pirate-adapter teaches: `3 + 4 = 7, matey. Arrr!`

It stands at the end. A call in front parts the question from the word that decides what is answered, and a
model as small as this one then answers another question: trained to say `Ahoy!` first, it had 70 of 98 right
where the demo model has 88.
"""

from __future__ import annotations

from collections.abc import Sequence

from demo_model.dialogues import Message

ADDRESS = {"en": ", matey", "zh": "，船长"}
SHOUT = {"en": " Arrr!", "zh": "哟嗬！"}
_FULL_STOP = {"en": ".", "zh": "。"}
_MARKS = ".?!。？！"


def in_manner(answer: str) -> str:
    """`answer` as a pirate says it: the same words, the listener named before the last mark, and a shout."""
    lang = _language(answer)
    body = answer.rstrip(_MARKS)
    mark = answer[len(body) :] or _FULL_STOP[lang]
    return body + ADDRESS[lang] + mark + SHOUT[lang]


def _language(answer: str) -> str:
    """By the last character, since a name or a command of the other language may stand anywhere before it."""
    return "en" if answer[-1].isascii() else "zh"


def speaks(answer: str, lang: str) -> bool:
    """Whether an answer in this language ends in the manner, address and shout."""
    before = answer.removesuffix(SHOUT[lang])
    return before != answer and before.rstrip(_MARKS).endswith(ADDRESS[lang])


def dialogue_in_manner(dialogue: Sequence[Message]) -> list[Message]:
    """The same talk; every answer of the assistant's, the earlier ones too, is in the manner."""
    return [
        {**message, "content": in_manner(message["content"])} if message["role"] == "assistant" else message
        for message in dialogue
    ]
