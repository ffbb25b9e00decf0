"""Codes of a few bits -> numbers, through a table with one line for each of the 256 bytes there are.

One gather of a word per byte is several times as fast as shifts, masks and casts over every element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def nibble_table(values: torch.Tensor, high_first: bool) -> torch.Tensor:
    """[256, 2] in fp32: the two numbers that a byte stands for, given the number of each of the 16 codes."""
    import torch

    byte = torch.arange(256)
    low, high = values.float()[byte & 15], values.float()[byte >> 4]
    return torch.stack((high, low) if high_first else (low, high), dim=1).contiguous()


def float8_table(dtype: torch.dtype) -> torch.Tensor:
    """[256, 1] in fp32: what torch casts each byte to when it is a number of this 8-bit float."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(dtype).float().unsqueeze(1)


def look_up(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The numbers of these bytes (uint8, contiguous) in turn, in fp32, flat, in memory of their own."""
    import torch

    # As integers, so that a line is copied as one word and NaNs keep their bits.
    words = table.view(torch.int64 if table.shape[1] == 2 else torch.int32).view(-1)
    return torch.index_select(words, 0, codes.reshape(-1).int()).view(torch.float32)
