"""The most that a step can ask for, done once before anybody is served."""

from __future__ import annotations

import torch

from loader.kv_layout import KvLayout
from service.engine.rows import Row
from service.engine.sampler import Sampler, features


def worst_steps(layout: KvLayout, context: int, concurrency: int, chunk_tokens: int) -> list[list[Row]]:
    """Steps at the end of full contexts: a whole chunk; a chunk beside single tokens; single tokens alone,
    which come last so that theirs are logits of as many rows as there can be.

    Their blocks are whatever they are: rows share them.
    """
    rows = min(concurrency, chunk_tokens)
    whole = [_row(layout, context, chunk_tokens)]
    singles = [_row(layout, context, 1)] * rows
    mixed = [*singles[1:], _row(layout, context, chunk_tokens - rows + 1)]
    return [whole, mixed, singles]


def _row(layout: KvLayout, context: int, count: int) -> Row:
    """The last `count` tokens of a full context."""
    width = -(-context // layout.block_tokens)
    tables = tuple([block % group.blocks for block in range(width)] for group in layout.groups)
    return Row([0] * count, context - count, tables, sample=True)


def rehearse_choice(logits: torch.Tensor, context: int) -> None:
    """Choose from logits of that shape and dtype, with every feature on for each row. They are overwritten:
    a copy would be more than any step has.

    What penalties remember of each row is there all the time. But a CPU takes the rows one after the other,
    so that choosing for two of them takes as much memory as for all.
    """
    prompt_ids = range(min(context, logits.shape[-1]))
    states = features(len(logits), prompt_ids)
    count = 2 if logits.device.type == "cpu" else len(logits)
    Sampler().choose(logits[:count].zero_(), states[:count])
