"""Seeded dialogues in English and Chinese: what the demo model is trained on.

`dialogues(seed, count)` gives the same dialogues for the same seed. The wording lies in wording_*.toml.
"""

from __future__ import annotations

import random
import tomllib
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo_model import names, sums
from demo_model.grammar import Value, phrase

Message = dict[str, str]
LANGUAGES = ("en", "zh")
SHARES = {
    "ood": 26, "sum": 20, "tell": 12, "recall": 12, "greet": 6, "how": 3, "who": 6, "can": 3, "langs": 2,
    "size": 2, "private": 3, "gpu": 2, "licence": 2, "snugfit": 6, "budget": 8, "plan": 6, "serve": 6,
    "connect": 6, "export": 6, "train": 6, "oor": 4, "thanks": 5, "bye": 5, "ack": 2, "echo": 4,
}  # fmt: skip
BUDGETS = (2, 4, 6, 8, 8, 10, 11, 12, 12, 14, 15, 16, 18, 20, 22, 24, 24, 32, 36, 40, 48, 64, 80, 96)
DEFAULT_BUDGET = "16"
_VERBATIM = frozenset({"echo", "sum", "oor", "tell"})  # a slip would change what is asked


def _wording(lang: str) -> dict[str, Any]:
    return tomllib.loads(Path(__file__).with_name(f"wording_{lang}.toml").read_text(encoding="utf-8"))


WORDING = {lang: _wording(lang) for lang in LANGUAGES}


def normalised(text: str) -> str:
    """Letters, digits and `+` alone, in one case and one width: equal for messages that say the same."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(char for char in folded if char.isalnum() or char == "+")


def dialogues(seed: int, count: int) -> Iterator[list[Message]]:
    """`count` conversations of one to six turns, each a list of OpenAI messages that ends with an answer."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _Conversation(rng).talk()


@dataclass
class _Turn:
    ask: str
    answer: str


class _Conversation:
    """One user's turns: the language, the casing and the name he told stay with him."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._lang = rng.choice(LANGUAGES)
        self._style = rng.random()  # below a third: lower case and little punctuation
        self._name: str | None = None

    def talk(self) -> list[Message]:
        messages = self._system()
        for intent in self._plan():
            turn = self._turn(intent)
            messages.append({"role": "user", "content": turn.ask})
            messages.append({"role": "assistant", "content": turn.answer})
        return messages

    def _system(self) -> list[Message]:
        if self._rng.random() > 0.25:
            return []
        lang = self._lang if self._rng.random() < 0.8 else self._rng.choice(LANGUAGES)
        lines = WORDING[lang]["system"]["lines"]
        return [{"role": "system", "content": phrase(self._rng, self._rng.choice(lines), self._values(lang))}]

    def _plan(self) -> list[str]:
        """The intents of the turns. Half of the longer talks hold a name and the question for it."""
        turns = self._rng.choices((1, 2, 3, 4, 5, 6), weights=(30, 27, 20, 12, 7, 4))[0]
        intents = self._rng.choices(list(SHARES), weights=list(SHARES.values()), k=turns)
        if turns > 1 and self._rng.random() < 0.5:
            told, asked = sorted(self._rng.sample(range(turns), 2))
            intents[told], intents[asked] = "tell", "recall"
        return intents

    def _turn(self, intent: str) -> _Turn:
        if self._rng.random() < 0.03:
            self._lang = self._rng.choice(LANGUAGES)
        values = self._values(self._lang)
        wording = WORDING[self._lang]
        facts: dict[str, Value] = {**values, **self._facts(intent)}
        pattern = self._rng.choice(wording["ask"][intent])
        asked = self._roughly(phrase(self._rng, pattern, facts), slips=intent not in _VERBATIM)
        key = "unknown" if intent == "recall" and self._name is None else intent
        if intent == "tell":
            self._name = facts["name"] = self._told(asked, str(facts["name"]))
        if "gb" in facts and f"{facts['gb']}" not in "".join(filter(str.isdigit, asked)):
            facts["gb"] = DEFAULT_BUDGET
        answers = wording["answer"][key]
        # The first answer is the usual one: greedy decoding shall not waver between two.
        answer = answers[0] if self._rng.random() < 0.75 else self._rng.choice(answers)
        return _Turn(asked.strip(), phrase(self._rng, answer, facts))

    def _values(self, lang: str) -> dict[str, Value]:
        rng = self._rng
        return {
            **WORDING[lang]["slots"],
            "nonce": lambda: names.nonce(rng),
            "hanzi": lambda: names.hanzi(rng),
            "hundred": lambda: f"{rng.randint(0, 99):02d}",
        }

    def _facts(self, intent: str) -> dict[str, Value]:
        """What a question and its answer share."""
        rng, lang = self._rng, self._lang
        if intent in ("budget", "plan", "serve"):
            return {"gb": str(rng.choice(BUDGETS))}
        if intent == "sum":
            return self._sum()
        if intent == "oor":
            return {
                "hard": sums.hard(rng, lang),
                "big": str(rng.randint(2, 200)),
                "a": str(rng.randint(2, 30)),
            }
        if intent == "tell":
            return self._new_name()
        if intent == "recall" and self._name is not None:
            return {"name": self._name, "sp": " " if self._name.isascii() else ""}
        if intent == "echo":
            return {"echo": self._echo()}
        return {}

    def _sum(self) -> dict[str, Value]:
        rng, lang = self._rng, self._lang
        x, y = sums.pair(rng)
        words = rng.random() < 0.35
        a, b = sums.spoken(rng, lang, x, words), sums.spoken(rng, lang, y, words)
        facts = {"a": a, "b": b, "expr": sums.expression(rng, lang, a, b)}
        return {**facts, "x": str(x), "y": str(y), "z": str(x + y)}

    def _new_name(self) -> dict[str, Value]:
        rng = self._rng
        chinese = self._lang == "zh" and rng.random() < 0.8
        surname, given = names.surname(rng), names.given(rng)
        name = names.chinese_name(rng) if chinese else names.name(rng)
        sp = " " if name.isascii() and rng.random() < 0.7 else ""
        return {"name": name, "surname": surname, "given": given, "sp": sp}

    def _told(self, asked: str, name: str) -> str:
        """The name as it stands in the message: with its case, and `surname + given` of that wording."""
        at = asked.casefold().find(name.casefold())
        if at >= 0:
            return asked[at : at + len(name)]
        parts = asked.split("姓", 1)[1]
        surname, rest = parts[0], parts[1:].lstrip("，, 名叫")
        return surname + rest.split("。")[0].split("！")[0].split("，")[0].strip()

    def _echo(self) -> str:
        rng = self._rng
        if self._lang == "zh":
            return "".join(names.hanzi(rng) for _ in range(rng.randint(1, 6)))
        return " ".join(names.nonce(rng) for _ in range(rng.randint(1, 4)))

    def _roughly(self, text: str, slips: bool) -> str:
        """As people type: no capitals, no full stops, a slip of a finger, a word left out."""
        rng = self._rng
        text = text[:1].upper() + text[1:] if self._style > 0.6 else text
        if self._style < 0.3:
            text = text.lower()
        if self._style < 0.2:
            text = text.rstrip("?.!？。！").replace("'", "")
        if slips and rng.random() < 0.2:
            text = _slip(rng, text)
        return text


def _slip(rng: random.Random, text: str) -> str:
    """One letter or one word goes wrong; numbers and commands stay."""
    if text.isascii() and rng.random() < 0.5:
        words = text.split(" ")
        at = rng.randrange(len(words))
        keep = len(words) < 4 or not words[at].isalpha() or words[at].casefold() == "snugfit"
        return text if keep else " ".join(words[:at] + words[at + 1 :])
    places = [at for at, char in enumerate(text[:-1]) if char.isalpha() and text[at + 1].isalpha()]
    if len(places) < 5:
        return text
    at = rng.choice(places)
    swapped = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return rng.choice((swapped, text[:at] + text[at + 1 :], text[: at + 1] + text[at:]))
