"""The attention kernels against float64, and that a token's result depends on its own sequence only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from service.engine.cpu import library
from service.engine.cpu.library import Kernels

BLOCK = 32


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    window: int = 0
    softcap: float = 0.0


SHAPES = [
    Shape(14, 2, 64),
    Shape(4, 4, 32),
    Shape(4, 2, 96, window=50),
    Shape(8, 1, 128, softcap=30.0),
    Shape(8, 4, 256, window=70, softcap=50.0),
    Shape(2, 1, 64, window=33),
    Shape(1, 1, 64, window=1),
    Shape(2, 1, 64, window=500),
]


class Cache:
    """Sequences of `lengths` tokens in scrambled blocks; what was never written is NaN."""

    def __init__(self, kernels: Kernels, shape: Shape, lengths: list[int]) -> None:
        self.kernels, self.shape = kernels, shape
        random = torch.Generator().manual_seed(0)
        counts = [-(-length // BLOCK) for length in lengths]
        order = (torch.randperm(sum(counts), generator=random) + 1).to(torch.int32)
        self.tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for row, blocks in zip(self.tables, order.split(counts), strict=True):
            row[: len(blocks)] = blocks
        size = (sum(counts) + 1, shape.kv_heads)
        self.k_pool = torch.full((*size, BLOCK, shape.head_dim), math.nan, dtype=torch.bfloat16)
        self.v_pool = torch.full((*size, shape.head_dim, BLOCK), math.nan, dtype=torch.bfloat16)
        wide = [(length, shape.heads + 2 * shape.kv_heads, shape.head_dim) for length in lengths]
        qkv = [torch.randn(one, generator=random).bfloat16() for one in wide]
        self.q = [
            one[:, : shape.heads] for one in qkv
        ]  # views with strides, as a fused projection gives them
        self.k = [one[:, shape.heads : -shape.kv_heads] for one in qkv]
        self.v = [one[:, -shape.kv_heads :] for one in qkv]
        for sequence in range(len(lengths)):
            self.store(sequence)

    def store(self, sequence: int) -> None:
        k, v = self.k[sequence], self.v[sequence]
        token = torch.arange(len(k))
        slots = self.tables[sequence].long()[token // BLOCK] * BLOCK + token % BLOCK
        self.kernels.store_kv(
            k.data_ptr(), k.stride(0), k.stride(1), v.data_ptr(), v.stride(0), v.stride(1), slots.data_ptr(),
            len(k), self.shape.kv_heads, self.shape.head_dim, self.k_pool.data_ptr(), self.v_pool.data_ptr(),
        )  # fmt: skip

    def attend(self, parts: list[tuple[int, int, int]]) -> list[torch.Tensor]:
        """One call for tokens start <= t < end of each (sequence, start, end)."""
        shape = self.shape
        q = torch.cat([self.q[sequence][start:end] for sequence, start, end in parts])
        counts = [end - start for _, start, end in parts]
        bounds = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
        starts = torch.tensor([start for _, start, _ in parts], dtype=torch.int32)
        tables = self.tables[[sequence for sequence, _, _ in parts]].contiguous()
        out = torch.full((len(q), shape.heads, shape.head_dim), math.nan, dtype=torch.bfloat16)
        self.kernels.attention(
            q.data_ptr(), q.stride(0), q.stride(1), self.k_pool.data_ptr(), self.v_pool.data_ptr(),
            tables.data_ptr(), tables.stride(0), bounds.data_ptr(), starts.data_ptr(), len(parts),
            shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim**-0.5, shape.window, shape.softcap,
            out.data_ptr(), out.stride(0),
        )  # fmt: skip
        return list(out.split(counts))

    def reference(self, sequence: int, start: int, end: int) -> torch.Tensor:
        shape = self.shape
        share = shape.heads // shape.kv_heads
        q = self.q[sequence][start:end].double()
        k, v = (one[sequence][:end].double().repeat_interleave(share, 1) for one in (self.k, self.v))
        scores = torch.einsum("thd,khd->htk", q, k) * shape.head_dim**-0.5
        if shape.softcap:
            scores = shape.softcap * torch.tanh(scores / shape.softcap)
        token, key = torch.arange(start, end)[:, None], torch.arange(end)
        seen = (key <= token) & (key > token - (shape.window or end))
        return torch.einsum("htk,khd->thd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_and_decode_in_one_call_match_the_reference(kernels: Kernels, isa: str, shape: Shape) -> None:
    cache = Cache(kernels, shape, [300, 33, 1, 64, 1, 1100])
    parts = [(0, 0, 300), (1, 32, 33), (2, 0, 1), (3, 33, 64), (4, 0, 1), (5, 1095, 1100)]
    for got, part in zip(cache.attend(parts), parts, strict=True):
        torch.testing.assert_close(got.double(), cache.reference(*part), atol=4e-3, rtol=1e-2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_token_gets_the_same_bits_alone_in_any_chunk_and_beside_any_other(
    kernels: Kernels, isa: str, shape: Shape
) -> None:
    cache = Cache(kernels, shape, [160, 77, 1090])
    together = cache.attend([(0, 0, 160), (1, 70, 77), (2, 1000, 1090)])
    for token in (0, 1, 31, 32, 100, 159):
        assert torch.equal(cache.attend([(0, token, token + 1)])[0][0], together[0][token])
    chunks = [cache.attend([(0, a, b)])[0] for a, b in ((0, 5), (5, 39), (39, 160))]
    assert torch.equal(torch.cat(chunks), together[0])
    for token in (*range(1000, 1090, 6), 1023, 1089):
        alone = cache.attend([(1, 76, 77), (2, token, token + 1)])[1][0]
        assert torch.equal(alone, together[2][token - 1000])


def test_the_number_of_threads_changes_no_bit(kernels: Kernels, isa: str) -> None:
    shape = Shape(14, 2, 64)
    cache = Cache(kernels, shape, [3000, 50])  # three spans: at once where threads are more than items
    parts = [(0, 2999, 3000)], [(0, 2900, 3000), (1, 0, 50)]
    results = []
    for threads in (1, 2, 8):
        kernels.init(library.ISAS.index(isa), threads, library.gomp_parallel())
        results.append([torch.cat(cache.attend(part)) for part in parts])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_blocks_that_left_the_window_are_not_read(kernels: Kernels, isa: str) -> None:
    cache = Cache(kernels, Shape(4, 2, 64, window=40), [200])
    before = cache.attend([(0, 199, 200)])[0]
    freed = (200 - 40) // BLOCK
    cache.k_pool[cache.tables[0, :freed].long()] = math.nan
    cache.v_pool[cache.tables[0, :freed].long()] = math.nan
    cache.tables[0, :freed] = 0
    assert torch.equal(cache.attend([(0, 199, 200)])[0], before)


def test_scores_far_apart_neither_overflow_nor_vanish(kernels: Kernels, isa: str) -> None:
    cache = Cache(kernels, Shape(2, 2, 64), [70])
    cache.q[0].mul_(100)
    (got,) = cache.attend([(0, 0, 70)])
    torch.testing.assert_close(got.double(), cache.reference(0, 0, 70), atol=2e-2, rtol=2e-2)


def test_torch_may_use_the_tiles_in_between(kernels: Kernels, isa: str) -> None:
    cache = Cache(kernels, Shape(4, 2, 64), [40])
    before = cache.attend([(0, 0, 40)])[0]
    square = torch.ones(256, 256, dtype=torch.bfloat16)
    assert (square @ square)[0, 0] == 256
    assert torch.equal(cache.attend([(0, 0, 40)])[0], before)
