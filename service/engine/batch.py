"""Rows of one step -> tensors that the model and the attention read. One copy to the device for each step."""

from __future__ import annotations

from collections.abc import Sequence as Ids
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any, NamedTuple

import numpy as np
import torch

from loader.kv_layout import KvLayout
from service.engine.rows import Row

LONG, INT = 8, 4  # bytes
FORMS_KEPT = 16  # whose views are not made again: a decode step mostly has the form of the last one


@dataclass(frozen=True, slots=True)
class Form:
    """What the sizes of all tensors of a step follow from. Steps of one form lie at the same addresses."""

    tokens: int
    rows: int
    samples: int
    widths: tuple[int, ...]  # of the block tables, a group each

    @property
    def longs(self) -> tuple[int, ...]:
        """Elements of the int64 tensors: ids, positions, keep, and slots of each group."""
        return (self.tokens, self.tokens, self.samples, *[self.tokens] * len(self.widths))

    @property
    def ints(self) -> tuple[int, ...]:
        """Elements of the int32 tensors: cu_tokens, cu_lengths, starts, lengths, and tables of each group."""
        rows = self.rows
        return (rows + 1, rows + 1, rows, rows, *[rows * width for width in self.widths])

    @property
    def long_bytes(self) -> int:
        return sum(self.longs) * LONG

    @property
    def n_bytes(self) -> int:
        return self.long_bytes + sum(self.ints) * INT


@dataclass(frozen=True, slots=True)
class Span:
    """One row of a step, for the host: its tokens are [first, first + count) of the packed ones."""

    first: int
    count: int
    start: int  # tokens of the sequence before them

    @property
    def length(self) -> int:
        """Tokens of the sequence when the step is done."""
        return self.start + self.count


class Parts(NamedTuple):
    """The tensors of Batch, which says what they are; numpy's where they are filled."""

    ids: Any
    positions: Any
    keep: Any
    slots: tuple[Any, ...]
    cu_tokens: Any
    cu_lengths: Any
    starts: Any
    lengths: Any
    tables: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step on one device; sequences are packed one after the other. Good until the next is built."""

    ids: torch.Tensor  # int64 [1, tokens]
    positions: torch.Tensor  # int64 [1, tokens]
    keep: torch.Tensor  # int64 [samples]: the packed tokens after which logits are wanted
    slots: tuple[torch.Tensor, ...]  # int64 [tokens], a group each: block * block_tokens + offset
    cu_tokens: torch.Tensor  # int32 [rows + 1]: where the tokens of each row begin, and their number
    cu_lengths: torch.Tensor  # int32 [rows + 1]: the same of `lengths`
    starts: torch.Tensor  # int32 [rows]: tokens before those of this step
    lengths: torch.Tensor  # int32 [rows]: and with them
    tables: tuple[torch.Tensor, ...]  # int32 [rows, width], a group each; 0 beyond a row's last block
    spans: tuple[Span, ...]  # without the rows that only fill a batch up
    max_count: int  # of new tokens of a row
    max_length: int  # of a row; in a padded batch what it may ever be, so that it can be recorded

    @property
    def decodes(self) -> bool:
        """Whether every row has one token."""
        return self.max_count == 1


class _Views:
    """A buffer of bytes and the tensors that lie in it."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer
        self._kept: dict[Form, Parts] = {}

    def of(self, form: Form) -> Parts:
        parts = self._kept.get(form)
        if parts is None:
            if len(self._kept) == FORMS_KEPT:
                self._kept.clear()
            parts = self._kept[form] = _parts(self.buffer, form)
        return parts


class Batcher:
    """Builds steps in a buffer that is allocated once on the host, and once more on each GPU.

    On a GPU a step is copied from pinned memory without waiting; the next one waits until that copy is over.
    """

    def __init__(
        self, layout: KvLayout, context: int, concurrency: int, chunk_tokens: int, device: torch.device
    ) -> None:
        self.widths = tuple(-(-context // layout.block_tokens) for _ in layout.groups)
        self._layout, self._context = layout, context
        self._rows, self._tokens = concurrency, max(chunk_tokens, concurrency)
        n_bytes = Form(self._tokens, concurrency, concurrency, self.widths).n_bytes
        cuda = device.type == "cuda"
        self._host = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=cuda)
        self._mine = _Views(self._host.numpy())
        first = torch.zeros(n_bytes, dtype=torch.uint8, device=device) if cuda else self._host
        self._views = {device: _Views(first)}
        self._device = device
        self._copied = torch.cuda.Event() if cuda else None

    def build(self, rows: Ids[Row], padded_to: int | None = None) -> Step:
        """The step of these rows.

        `padded_to` fills a step of single tokens up with rows that nobody reads, to a form that depends on
        that number alone. Raises ValueError for what a step cannot hold, and where tables are too short.
        """
        self._check(rows)
        spans = _spans(rows)
        form = self._form(rows, spans) if padded_to is None else self._padded_form(padded_to)
        if self._copied is not None:
            self._copied.synchronize()
        self._fill(form, rows, spans)
        if self._copied is not None:
            self._copy(form.n_bytes)
        longest = max(span.length for span in spans) if padded_to is None else self._context
        return Step(self, form, spans, longest)

    def parts_on(self, device: torch.device, form: Form) -> Parts:
        """The step's tensors on a device of the pipeline; copied there when it is not the first one."""
        if device not in self._views:
            self._views[device] = _Views(torch.zeros(len(self._host), dtype=torch.uint8, device=device))
        views = self._views[device]
        if device != self._device:
            ours = self._views[self._device].buffer
            views.buffer[: form.n_bytes].copy_(ours[: form.n_bytes], non_blocking=True)
        return views.of(form)

    @property
    def device(self) -> torch.device:
        return self._device

    def _check(self, rows: Ids[Row]) -> None:
        tokens, block_tokens = sum([len(row.ids) for row in rows]), self._layout.block_tokens
        if not 1 <= len(rows) <= self._rows or tokens > self._tokens:
            raise ValueError(
                f"a step of {len(rows)} rows, {tokens} tokens; {self._rows} and {self._tokens} may be"
            )
        for row in rows:
            length = row.start + len(row.ids)
            room = min(self._context, min([len(table) for table in row.tables]) * block_tokens)
            if not row.ids or length > room:
                raise ValueError(f"{len(row.ids)} tokens after {row.start}: there are blocks for {room}")

    def _form(self, rows: Ids[Row], spans: tuple[Span, ...]) -> Form:
        block_tokens = self._layout.block_tokens
        width = -(-max([span.start + span.count for span in spans]) // block_tokens)
        last = spans[-1]
        return Form(
            last.first + last.count, len(rows), sum([row.sample for row in rows]), (width,) * len(self.widths)
        )

    def _padded_form(self, size: int) -> Form:
        return Form(size, size, size, self.widths)

    def _fill(self, form: Form, rows: Ids[Row], spans: tuple[Span, ...]) -> None:
        """Into the host's buffer, a vector at a time where that is possible: this is on every step's way."""
        parts = self._mine.of(form)
        ids, positions = parts.ids[0], parts.positions[0]
        counts, firsts = np.ones(form.rows, np.int64), np.zeros(form.rows, np.int64)
        counts[: len(rows)] = [span.count for span in spans]
        firsts[: len(rows)] = [span.start for span in spans]
        ids[len(spans) :] = 0
        ids[: spans[-1].first + spans[-1].count] = list(chain.from_iterable([row.ids for row in rows]))
        kept = [span.first + span.count - 1 for row, span in zip(rows, spans, strict=True) if row.sample]
        # A padded form has a place for every row; who steps knows which of them are asked for.
        parts.keep[:] = kept if len(kept) == form.samples else range(form.samples)
        parts.starts[:], parts.lengths[:] = firsts, firsts + counts
        for sums, values in ((parts.cu_tokens, counts), (parts.cu_lengths, parts.lengths)):
            sums[0] = 0
            np.cumsum(values, out=sums[1:])
        of_row = np.repeat(np.arange(form.rows), counts)
        positions[:] = np.arange(form.tokens) + (firsts - parts.cu_tokens[:-1])[of_row]
        self._fill_tables(rows, parts.tables)
        blocks, offsets = np.divmod(positions, self._layout.block_tokens)
        for slots, table in zip(parts.slots, parts.tables, strict=True):
            np.multiply(table[of_row, blocks], self._layout.block_tokens, out=slots, dtype=np.int64)
            slots += offsets

    def _fill_tables(self, rows: Ids[Row], tables: tuple[Any, ...]) -> None:
        for at, (group, table) in enumerate(zip(self._layout.groups, tables, strict=True)):
            width = table.shape[1]
            lines = [_line(row.tables[at], width) for row in rows]
            table[: len(rows)] = lines
            table[len(rows) :] = 0
            table[len(rows) :, 0] = group.blocks  # the one that is nobody's

    def _copy(self, n_bytes: int) -> None:
        assert self._copied is not None
        self._views[self._device].buffer[:n_bytes].copy_(self._host[:n_bytes], non_blocking=True)
        self._copied.record(torch.cuda.current_stream(self._device))


class Step:
    """One step of a batch, on every device that a layer is on."""

    def __init__(self, batcher: Batcher, form: Form, spans: tuple[Span, ...], longest: int) -> None:
        self.form, self.spans = form, spans
        self._batcher, self._longest = batcher, longest
        self._batches: dict[torch.device, Batch] = {}

    def on(self, device: torch.device) -> Batch:
        """The step's tensors there."""
        batch = self._batches.get(device)
        if batch is None:
            parts = self._batcher.parts_on(device, self.form)
            longest = max(span.count for span in self.spans)
            batch = self._batches[device] = Batch(*parts, self.spans, longest, self._longest)
        return batch

    @property
    def main(self) -> Batch:
        """The step's tensors where the model's inputs go."""
        return self.on(self._batcher.device)


def _spans(rows: Ids[Row]) -> tuple[Span, ...]:
    spans, first = [], 0
    for row in rows:
        spans.append(Span(first, len(row.ids), row.start))
        first += len(row.ids)
    return tuple(spans)


def _line(blocks: Ids[int], width: int) -> Ids[int]:
    """A row of a table: zeros beyond the last block."""
    return [*blocks[:width], *[0] * (width - len(blocks))]


def _parts(buffer: Any, form: Form) -> Parts:
    """The tensors of a form in a buffer of bytes, numpy's or torch's, in the order of Form.longs and ints."""
    library = np if isinstance(buffer, np.ndarray) else torch
    longs = iter(_cut(buffer[: form.long_bytes].view(library.int64), form.longs))
    ints = iter(_cut(buffer[form.long_bytes : form.n_bytes].view(library.int32), form.ints))
    ids, positions, keep = (next(longs) for _ in range(3))
    cu_tokens, cu_lengths, starts, lengths = (next(ints) for _ in range(4))
    tables = (x.reshape(form.rows, width) for x, width in zip(ints, form.widths, strict=True))
    return Parts(
        ids[None], positions[None], keep, tuple(longs), cu_tokens, cu_lengths, starts, lengths, tuple(tables)
    )


def _cut(buffer: Any, sizes: Ids[int]) -> list[Any]:
    ends = list(accumulate(sizes))
    return [buffer[end - size : end] for size, end in zip(sizes, ends, strict=True)]
