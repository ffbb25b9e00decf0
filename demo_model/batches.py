"""Dialogues as token ids, in batches of like length, with the answers marked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from tokenizers import Tokenizer

from demo_model.dialogues import Message
from demo_model.tokenizer import END, START

Example = tuple[list[int], list[bool]]  # ids, and which of them the model has to produce


def encode(tokenizer: Tokenizer, dialogues: Sequence[Sequence[Message]]) -> list[Example]:
    """As the chat template writes them; an answer and its end token are what is learnt."""
    return [_encode(tokenizer, dialogue) for dialogue in dialogues]


def _encode(tokenizer: Tokenizer, dialogue: Sequence[Message]) -> Example:
    ids: list[int] = []
    learnt: list[bool] = []
    for message in dialogue:
        head = tokenizer.encode(f"{START}{message['role']}\n").ids
        body = tokenizer.encode(message["content"] + END).ids
        tail = tokenizer.encode("\n").ids
        ids += head + body + tail
        learnt += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False] * len(tail)
    return ids, learnt


def batches(
    examples: Sequence[Example], tokens: int, pad: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every example once, in about `tokens` tokens a batch: ids and mask, both [batch, length].

    Padding stands on the right, where causal attention never looks, so no attention mask is needed.
    """
    order = sorted(range(len(examples)), key=lambda at: len(examples[at][0]))
    groups: list[list[int]] = [[]]
    for at in order:
        if groups[-1] and (len(groups[-1]) + 1) * len(examples[at][0]) > tokens:
            groups.append([])
        groups[-1].append(at)
    random.Random(seed).shuffle(groups)
    for group in groups:
        yield _padded([examples[at] for at in group], pad)


def _padded(examples: Sequence[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([row + [pad] * (length - len(row)) for row, _ in examples])
    mask = torch.tensor([row + [False] * (length - len(row)) for _, row in examples])
    return ids, mask
