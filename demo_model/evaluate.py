"""Asks a saved demo model the questions of a .toml file and says how many answers hold what they must.

`python -m demo_model.evaluate service/demo` prints the failures and one JSON line; the exit code is 0 at or
above the bar, 1 below it. Decoding is greedy. Earlier answers of a conversation are the model's own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo_model.dialogues import Message, normalised

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QUESTIONS = Path(__file__).with_name("questions.toml")
BAR = 0.85
MAX_NEW_TOKENS = 120


@dataclass(frozen=True)
class Question:
    """The user's messages; the answer to the last must hold every entry of `must`, where `a|b` is either."""

    kind: str
    lang: str
    say: tuple[str, ...]
    must: tuple[str, ...]
    system: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    question: Question
    answer: str
    fault: str  # "" when the answer is right


def read(path: Path = QUESTIONS) -> list[Question]:
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["question"]
    return [
        Question(row["kind"], row["lang"], tuple(row["say"]), tuple(row["must"]), row.get("system"),
                 tuple(row.get("names", ())))
        for row in rows
    ]  # fmt: skip


class HeldOut:
    """What training must not see: the messages and the names of the questions."""

    def __init__(self, questions: Iterable[Question]) -> None:
        asked = list(questions)
        self._messages = {normalised(message) for question in asked for message in question.say}
        names = sorted({name for question in asked for name in question.names})
        bounded = (rf"\b{re.escape(name)}\b" if name.isascii() else re.escape(name) for name in names)
        self._names = re.compile("|".join(bounded) or r"(?!)", re.IGNORECASE)

    def is_in(self, dialogue: Sequence[Message]) -> bool:
        return any(
            (message["role"] == "user" and normalised(message["content"]) in self._messages)
            or self._names.search(message["content"]) is not None
            for message in dialogue
        )


class Answerer:
    """A saved model, answering one conversation at a time with its own generation defaults, greedily."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()

    def answer(self, messages: Sequence[Message]) -> list[int]:
        """The ids of the next answer; it ends with an end token unless it ran into MAX_NEW_TOKENS."""
        inputs = self.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        return list(ids[0, inputs["input_ids"].shape[1] :].tolist())

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def judge(self, question: Question) -> Verdict:
        messages: list[Message] = []
        if question.system is not None:
            messages.append({"role": "system", "content": question.system})
        faults = []
        for message in question.say:
            messages.append({"role": "user", "content": message})
            ids = self.answer(messages)
            messages.append({"role": "assistant", "content": self.text(ids)})
            faults.append(self._form(ids, messages[-1]["content"]))
        answer = messages[-1]["content"]
        fault = next(filter(None, faults), "") or self._content(question, answer)
        return Verdict(question, answer, fault)

    def _form(self, ids: Sequence[int], answer: str) -> str:
        """What no answer may be, whatever was asked."""
        if len(ids) >= MAX_NEW_TOKENS:
            return "loop"
        return "broken UTF-8" if "�" in answer else ""

    def _content(self, question: Question, answer: str) -> str:
        missing = [wanted for wanted in question.must if not holds(answer, wanted)]
        return f"lacks {missing[0]}" if missing else ""


def holds(answer: str, wanted: str) -> bool:
    """Whether one of `a|b` stands in the answer, in any case; a number is not found inside a longer one."""
    options = (re.escape(option) for option in wanted.split("|"))
    return re.search(rf"(?<!\d)(?:{'|'.join(options)})(?!\d)", answer, re.IGNORECASE) is not None


def evaluate(folder: Path, questions: Sequence[Question]) -> dict[str, Any]:
    """Prints a table of failures; returns the counts, per language and per kind too."""
    answerer = Answerer(folder)
    started = time.perf_counter()
    verdicts = [answerer.judge(question) for question in questions]
    for verdict in verdicts:
        if verdict.fault:
            where = f"{verdict.question.lang} {verdict.question.kind}"
            print(f"{where:<16} {verdict.fault:<24} {' / '.join(verdict.question.say)} -> {verdict.answer}")
    return {**_counts(verdicts), "seconds": round(time.perf_counter() - started, 1)}


def _counts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    right = [verdict for verdict in verdicts if not verdict.fault]
    faults = Counter(verdict.fault.split(" ")[0] for verdict in verdicts if verdict.fault)
    return {
        "asked": len(verdicts),
        "right": len(right),
        "share": round(len(right) / len(verdicts), 4),
        "loops": faults["loop"],
        "broken_utf8": faults["broken"],
        "by_language": _by([(verdict.question.lang, not verdict.fault) for verdict in verdicts]),
        "by_kind": _by([(verdict.question.kind, not verdict.fault) for verdict in verdicts]),
    }


def _by(results: Sequence[tuple[str, bool]]) -> dict[str, str]:
    """`{"en": "48/51"}`."""
    asked = Counter(group for group, _ in results)
    right = Counter(group for group, ok in results if ok)
    return {group: f"{right[group]}/{count}" for group, count in asked.items()}


def passed(result: dict[str, Any]) -> bool:
    return result["share"] >= BAR and not result["loops"] and not result["broken_utf8"]


def unseen(folder: Path) -> bool:
    """Whether no question stood in the training data.

    Generated once more, with the questions of today left out, it must have the hash that PROVENANCE.json has.
    """
    from demo_model.corpus import generate  # late: corpus imports HeldOut from here

    data = json.loads((folder / "PROVENANCE.json").read_text(encoding="utf-8"))["data"]
    return generate(data["seed"], data["generated"]).sha256 == data["sha256"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Judge a demo model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    arguments = parser.parse_args(argv)
    questions = read(arguments.questions)
    if not unseen(arguments.folder):
        print("the generator or the questions have changed since it was trained: train it again.")
        return 1
    result = evaluate(arguments.folder, questions)
    print(json.dumps(result, ensure_ascii=False))
    return 0 if passed(result) else 1


if __name__ == "__main__":
    sys.exit(main())
