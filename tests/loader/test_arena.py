"""loader/arena.py: one buffer, handed out in aligned pieces until it is full."""

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loader import arena, probe
from loader.arena import ALIGN_BYTES, Arena, aligned

MiB = 2**20

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)

pieces = st.lists(
    st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(DTYPES)), min_size=1, max_size=12
)


def taken(arena, *shape, dtype=torch.float32):
    return arena.take(torch.Size(shape), dtype)


def offset(tensor):
    return tensor.storage_offset() * tensor.itemsize


@given(pieces)
def test_pieces_are_aligned_and_never_overlap(wanted):
    arena = Arena(sum(aligned(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in wanted), CPU)
    tensors = [arena.take(torch.Size(shape), dtype) for shape, dtype in wanted]
    end = 0
    for tensor, (shape, dtype) in zip(tensors, wanted, strict=True):
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (torch.Size(shape), dtype, True)
        assert offset(tensor) % ALIGN_BYTES == 0
        assert offset(tensor) >= end
        end = offset(tensor) + tensor.nbytes
    assert end <= arena.used_bytes <= arena.capacity_bytes


def test_all_pieces_are_views_of_one_buffer_of_the_planned_size():
    arena = Arena(10_000, CPU)
    first, second = taken(arena, 3, 5), taken(arena, 7, dtype=torch.bfloat16)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert first.untyped_storage().nbytes() == 10_000


def test_what_is_written_into_one_piece_stays_out_of_the_others():
    arena = Arena(10 * ALIGN_BYTES, CPU)
    tensors = [taken(arena, 60) for _ in range(5)]
    for value, tensor in enumerate(tensors):
        tensor.fill_(value)
    assert [tensor.unique().tolist() for tensor in tensors] == [[0.0], [1.0], [2.0], [3.0], [4.0]]


def test_a_full_arena_refuses_with_its_numbers_and_still_gives_what_fits():
    arena = Arena(2 * ALIGN_BYTES, CPU)
    taken(arena, 10)
    with pytest.raises(MemoryError, match=r"arena of 512 bytes: 400 more do not fit at 256"):
        taken(arena, 100)
    assert arena.used_bytes == 40
    assert taken(arena, ALIGN_BYTES // 4).numel() == 64
    with pytest.raises(MemoryError):
        taken(arena, 1, dtype=torch.uint8)


def test_the_last_piece_needs_no_room_behind_it():
    arena = Arena(ALIGN_BYTES + 12, CPU)
    taken(arena, 1)
    assert taken(arena, 3).nbytes == 12


def test_an_arena_without_huge_pages_is_memory_as_any_other(monkeypatch):
    monkeypatch.setattr(arena, "_huge_buffer", None)
    assert Arena(64 * MiB, CPU, huge_pages=False).take(torch.Size([64 * MiB]), torch.uint8).nbytes == 64 * MiB


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
def test_a_large_arena_begins_at_a_huge_page_and_takes_no_more_memory_for_it():
    before = probe.resident_bytes()
    arena = Arena(64 * MiB + 1000, CPU)
    tensor = taken(arena, 64 * MiB + 1000, dtype=torch.uint8)
    tensor.fill_(1)
    assert tensor.data_ptr() % (2 * MiB) == 0
    assert probe.resident_bytes() - before < 65 * MiB
    with pytest.raises(MemoryError, match="arena of 67,109,864 bytes"):
        taken(arena, 1, dtype=torch.uint8)


@given(st.integers(0, 2**40))
def test_aligned_is_the_next_multiple(n_bytes):
    assert aligned(n_bytes) % ALIGN_BYTES == 0
    assert 0 <= aligned(n_bytes) - n_bytes < ALIGN_BYTES
