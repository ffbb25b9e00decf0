"""Integers of a few bits each, packed one after the other without a gap, the lowest bit first.

GPTQ packs that way: its 32-bit words, little-endian, put end to end are one stream of bits. That holds for
its 3-bit layout too, where a value may begin in one word and end in the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WIDTHS = (2, 3, 4, 8)

# The values of one byte (of three for 3 bits) are moved apart until each has a byte of its own, by halves:
# 8 -> 4 + 4 -> 2 + 2 + 2 + 2 bits. (how far the upper halves move, where both halves then are)
_SPREAD = {
    2: ((12, 0x000F_000F), (6, 0x0303_0303)),
    3: ((20, 0x0000_0FFF_0000_0FFF), (10, 0x003F_003F_003F_003F), (5, 0x0707_0707_0707_0707)),
    4: ((4, 0x0F0F),),
}


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n * bits / 8] bytes -> [rows, n] uint8; bits is one of WIDTHS. Eight bits come as they are."""
    import torch

    if bits == 8:
        return packed
    wide = _widened(packed, bits)
    for shift, mask in _SPREAD[bits]:
        wide = (wide << shift).bitwise_or_(wide).bitwise_and_(mask)
    return wide.view(torch.uint8)


def _widened(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """An integer that has a byte for each value: from every byte, or from every three."""
    import torch

    if bits != 3:
        return packed.to({2: torch.int32, 4: torch.int16}[bits])
    rows, n_bytes = packed.shape
    room = torch.zeros((rows, n_bytes // 3, 8), dtype=torch.uint8)
    room[:, :, :3] = packed.reshape(rows, n_bytes // 3, 3)
    return room.view(torch.int64).view(rows, n_bytes // 3)
