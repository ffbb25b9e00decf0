"""Attention over blocks: SDPA for any device and dtype, FlashAttention's paged form for newer GPUs."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from loader.packed import QUERIES_AT_ONCE
from service.engine.attention import Backend
from service.engine.batch import Batch, Span
from service.engine.pool import LayerShape, LayerStore, Shapes

FLASH_BLOCK_TOKENS = 256  # FlashAttention-2 takes pages of multiples of this
FLASH_HEAD_DIM = 256
WRONG_KEYS = 32


class Paged:
    """Keys and values [blocks, block_tokens, kv_heads, head_dim]."""

    def __init__(self, store: LayerStore) -> None:
        self.store = store
        self._flat = tuple(x.view(-1, *x.shape[2:]) for x in (store.keys, store.values))

    @staticmethod
    def shapes(layer: LayerShape, blocks: int, block_tokens: int) -> Shapes:
        shape = (blocks, block_tokens, layer.kv_heads, layer.head_dim)
        return shape, shape

    def write(self, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        slots = batch.slots[self.store.group]
        self._flat[0].index_copy_(0, slots, key)
        self._flat[1].index_copy_(0, slots, value)


class TorchAttention(Paged):
    """Each sequence by itself, through a copy of its keys and values: the oracle of the other backends.

    On the CPU a token's attention does not depend on what else is in the batch.
    """

    recordable = False

    def attend(self, query: torch.Tensor, batch: Batch, scale: float, softcap: float | None) -> torch.Tensor:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        for row in range(len(batch.spans)):
            self._attend_row(query, batch, row, scale, softcap, output)
        return output

    def _attend_row(
        self,
        query: torch.Tensor,
        batch: Batch,
        row: int,
        scale: float,
        softcap: float | None,
        output: torch.Tensor,
    ) -> None:
        """Some queries at a time; a key is read again for each of these pieces, and not copied again."""
        span = batch.spans[row]
        first = self._first_seen(span.start)
        keys, values = self._gather(batch, row, first, span.length)
        start, end = span.start, span.length
        while start < end:
            low = self._first_seen(start)
            count = self._at_once(end - start, start - low)
            at = span.first + start - span.start
            piece, seen = slice(at, at + count), slice(low - first, start + count - first)
            mask = self._mask(start, count, low, query.device)
            output[piece] = _attention(query[piece], keys[seen], values[seen], mask, scale, softcap)
            start += count

    def _at_once(self, queries: int, before: int) -> int:
        """How many of a row's next queries go together; the first of them sees `before` tokens and itself."""
        del before
        return min(QUERIES_AT_ONCE, queries)

    def _first_seen(self, position: int) -> int:
        """The first token that the one at `position` sees."""
        return 0 if self.store.window is None else max(0, position + 1 - self.store.window)

    def _gather(self, batch: Batch, row: int, first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens [first, end) of a sequence, [tokens, kv_heads, head_dim] each."""
        size = self.store.block_tokens
        low = first // size
        blocks = batch.tables[self.store.group][row, low : -(-end // size)]
        seen = slice(first - low * size, end - low * size)
        keys, values = (x[blocks].view(-1, *x.shape[2:])[seen] for x in (self.store.keys, self.store.values))
        return keys, values

    def _mask(self, start: int, count: int, first: int, device: torch.device) -> torch.Tensor | None:
        """Which of the tokens [first, start + count) each of the last `count` sees. None: all of them."""
        if count == 1:
            return None
        mine = torch.arange(start, start + count, device=device)[:, None]
        theirs = torch.arange(first, start + count, device=device)
        mask = theirs <= mine
        if self.store.window is not None:
            mask &= theirs > mine - self.store.window
        return mask


class PaddedTorchAttention(TorchAttention):
    """For GPUs that FlashAttention does not serve, where a sequence at a time is too many launches: single
    tokens go together, in groups whose padded copies are no larger than that of one full context.

    Queries of a prompt that would see 1, 33, 65 ... keys together are split otherwise: there torch 2.13's
    memory-efficient attention computes something else when a mask is given and heads share keys
    (pytorch/pytorch#191937).
    """

    def attend(self, query: torch.Tensor, batch: Batch, scale: float, softcap: float | None) -> torch.Tensor:
        if softcap is not None:
            return super().attend(query, batch, scale, softcap)
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        singles = [row for row, span in enumerate(batch.spans) if span.count == 1]
        for group in self._groups(singles, batch):
            self._attend_singles(query, batch, group, scale, output)
        for row, span in enumerate(batch.spans):
            if span.count > 1:
                self._attend_row(query, batch, row, scale, softcap, output)
        return output

    def _at_once(self, queries: int, before: int) -> int:
        count = super()._at_once(queries, before)
        return count - 1 if count > 1 and (before + count) % WRONG_KEYS == 1 else count

    def _groups(self, rows: list[int], batch: Batch) -> Iterator[list[int]]:
        """Rows of like length together, so that their padded copies take no more than one full context."""
        room = batch.tables[self.store.group].shape[1]
        group: list[int] = []
        for row in sorted(rows, key=lambda row: -self._blocks(batch.spans[row])):
            if group and (len(group) + 1) * self._blocks(batch.spans[group[0]]) > room:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _blocks(self, span: Span) -> int:
        """That the single token of a row sees."""
        size = self.store.block_tokens
        return -(-span.length // size) - self._first_seen(span.start) // size

    def _attend_singles(
        self, query: torch.Tensor, batch: Batch, rows: list[int], scale: float, output: torch.Tensor
    ) -> None:
        """One SDPA over a padded batch; `rows` begin with the one that sees the most blocks."""
        size, width = self.store.block_tokens, self._blocks(batch.spans[rows[0]])
        device = query.device
        spans = [batch.spans[row] for row in rows]
        firsts = [self._first_seen(span.start) for span in spans]
        numbers = torch.tensor(
            [(row, s.first, f // size, f - f // size * size, s.start - f // size * size)
             for row, s, f in zip(rows, spans, firsts, strict=True)],
            device=device,
        )  # fmt: skip
        which, at, low, first, last = numbers.T
        table = batch.tables[self.store.group]
        columns = (low[:, None] + torch.arange(width, device=device)).clamp_(max=table.shape[1] - 1)
        blocks = table[which[:, None], columns]
        theirs = torch.arange(width * size, device=device)
        mask = (theirs >= first[:, None]) & (theirs <= last[:, None])
        # Zeros where nothing is seen: whatever lies there, even a NaN of a request that failed.
        hidden = ~mask[:, :, None, None]
        keys, values = (
            x[blocks].view(len(rows), -1, *x.shape[2:]).masked_fill_(hidden, 0).transpose(1, 2)
            for x in (self.store.keys, self.store.values)
        )
        kv_heads, head_dim = keys.shape[1], keys.shape[3]
        # The heads that share a key are its queries: no key is repeated, for there is but one token.
        queries = query[at].view(len(rows), kv_heads, -1, head_dim)
        seen = mask[:, None, None].expand(-1, -1, queries.shape[2], -1)
        out = scaled_dot_product_attention(queries, keys, values, attn_mask=seen, scale=scale)
        output[at] = out.reshape(len(rows), -1, head_dim)  # on a GPU its heads may lie outermost


def _attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """[queries, heads, head_dim] of one sequence. Keys [tokens, kv_heads, head_dim] are not repeated."""
    count, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    # kv heads stand as the batch, and the heads that share one as its heads.
    queries = query.view(count, kv_heads, heads // kv_heads, head_dim).permute(1, 2, 0, 3)
    shared = (kv_heads, heads // kv_heads, keys.shape[0], head_dim)
    k, v = (x.permute(1, 0, 2)[:, None].expand(shared) for x in (keys, values))
    if softcap is None:
        out = scaled_dot_product_attention(queries, k, v, attn_mask=mask, scale=scale)
    else:
        out = _capped(queries, k, v, mask, scale, softcap)
    return out.permute(2, 0, 1, 3).reshape(count, heads, head_dim)


def _capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Scores in float32, as transformers' eager attention has them from the softmax on."""
    scores = torch.matmul(query, keys.transpose(2, 3)).float().mul_(scale / softcap).tanh_().mul_(softcap)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return torch.matmul(scores.softmax(-1).to(values.dtype), values)


class VarlenAttention(Paged):
    """torch.nn.attention.varlen: FlashAttention-2 reads the blocks where they are.

    What holds for the same token in other batches: tokens of prompts are attended to in one pass over the
    keys (num_splits=1), in an order that other rows do not change. Single tokens whose heads share keys leave
    the number of splits to the kernel, which takes it from the number of rows and the context, so the last
    bit may differ between batches of different sizes; as it may in cuBLAS' products. In any other form torch
    2.13 puts the splits of packed rows together in the wrong places, so there is one.
    """

    recordable = True

    def __init__(self, store: LayerStore) -> None:
        super().__init__(store)
        logging.getLogger(varlen.__name__).setLevel(logging.WARNING)  # else it tells of every single call

    def attend(self, query: torch.Tensor, batch: Batch, scale: float, softcap: float | None) -> torch.Tensor:
        del softcap  # serves() has refused it
        store = self.store
        # A single token sees all there is, causal or not; and only without any window FlashAttention reads
        # keys once for all heads that share them, and splits them over the GPU.
        window = (-1, -1) if batch.decodes else (-1, 0)
        if store.window is not None and store.window < batch.max_length:
            window = (store.window - 1, 0)
        splits = window == (-1, -1) and query.shape[1] > store.keys.shape[2]
        return _varlen_attn(
            query,
            store.keys,
            store.values,
            batch.cu_tokens,
            batch.cu_lengths,  # not read when there are pages, but its shape is checked
            batch.max_count,
            batch.max_length,
            scale=scale,
            window_size=window,
            enable_gqa=True,
            seqused_k=batch.lengths,
            block_table=batch.tables[store.group],
            num_splits=None if splits else 1,
        )

    @staticmethod
    def serves(layer: LayerShape, block_tokens: int) -> bool:
        return (
            layer.device.type == "cuda"
            and torch.cuda.get_device_capability(layer.device) >= (8, 0)
            and layer.dtype in (torch.float16, torch.bfloat16)
            and layer.head_dim <= FLASH_HEAD_DIM
            and layer.head_dim % 8 == 0
            and layer.softcap is None
            and block_tokens % FLASH_BLOCK_TOKENS == 0
        )


def _varlen_attn(*args: Any, **options: Any) -> torch.Tensor:
    output = varlen.varlen_attn(*args, **options)
    assert isinstance(output, torch.Tensor)  # not a pair: no log-sum-exp is asked for
    return output


def backend_for(layer: LayerShape, block_tokens: int) -> type[Backend]:
    """The fastest that serves such a layer."""
    from service.engine.cpu.attention import NativeAttention

    if VarlenAttention.serves(layer, block_tokens):
        return VarlenAttention
    if NativeAttention.serves(layer, block_tokens):
        return NativeAttention
    return TorchAttention if layer.device.type == "cpu" else PaddedTorchAttention
