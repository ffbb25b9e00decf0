"""The training data: generated dialogues less those that hold an evaluation question or name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from demo_model import evaluate
from demo_model.dialogues import Message, dialogues


@dataclass(frozen=True)
class Corpus:
    dialogues: list[list[Message]]
    generated: int  # before those that hold a question were dropped
    sha256: str  # of the kept dialogues, one JSON line each


def generate(seed: int, count: int) -> Corpus:
    held_out = evaluate.HeldOut(evaluate.read())
    kept = [dialogue for dialogue in dialogues(seed, count) if not held_out.is_in(dialogue)]
    return Corpus(kept, count, sha256_of(kept))


def sha256_of(dialogues: Sequence[Sequence[Message]]) -> str:
    digest = hashlib.sha256()
    for dialogue in dialogues:
        digest.update(json.dumps(dialogue, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
