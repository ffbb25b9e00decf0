"""Finds the greatest of many scores, and draws by weight: on [rows, vocab], each row for itself.

On CPUs torch's sort, topk and argmax of a whole vocabulary take longer than many steps of the rest together.
Most of these functions want rows that are filled up (`padded`) with what changes nothing: -inf, or weight 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

SEGMENTS = 64  # into which a row is cut where its elements are not all read twice


def padded(vocab: int) -> int:
    """The next multiple of SEGMENTS, which the widths of groups have to divide."""
    return -(-vocab // SEGMENTS) * SEGMENTS


def argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest of each row [rows, 1], NaN being the greatest of all, and the lowest id that has it.

    On CPUs torch's argmax is 10 times as slow as its amax: so only the segment that has it is searched.
    """
    if scores.device.type != "cpu":
        return scores.max(1, keepdim=True)
    vocab = scores.shape[1]
    width = padded(vocab) // SEGMENTS
    cut = vocab // width * width
    heads = scores[:, :cut].unflatten(1, (-1, width)).amax(-1)
    if cut < vocab:
        heads = torch.cat([heads, scores[:, cut:].amax(1, keepdim=True)], 1)
    segment = heads.argmax(1, keepdim=True)
    ids = segment * width + torch.arange(width).clamp_(max=vocab - 1)
    found = scores.gather(1, ids.clamp_(max=vocab - 1)).argmax(1, keepdim=True)
    return heads.gather(1, segment), segment * width + found


def segment_sums(weights: Tensor) -> Tensor:
    """[rows, SEGMENTS] of padded weights. Unlike sums of whole rows, torch adds these in the same order
    however many rows."""
    return weights.unflatten(1, (SEGMENTS, -1)).sum(-1)


def find_segment(ends: Tensor, point: Tensor) -> Tensor:
    """The segment of each row [rows, 1] in which the point, a share of all, lies; `ends` are running sums."""
    point = point * ends[:, -1:]
    return torch.searchsorted(ends, point, right=True).clamp_(max=ends.shape[1] - 1)


def segment_of(rows: Tensor, segment: Tensor) -> Tensor:
    """That segment [rows, 1] of each padded row: [rows, width]."""
    table = rows.unflatten(1, (SEGMENTS, -1))
    if len(table) == 1:  # on CPUs faster than gather
        return table[0].index_select(0, segment[0])
    return table.gather(1, segment[:, :, None].expand(-1, -1, table.shape[2]))[:, 0]


def draw_inside(weights: Tensor, ends: Tensor, segment: Tensor, point: Tensor) -> Tensor:
    """Places [rows, 1] in the segments whose weights these are, each as likely as its weight."""
    start = torch.where(segment > 0, ends.gather(1, (segment - 1).clamp_(min=0)), 0.0)
    share = (point * ends[:, -1:] - start).div_(ends.gather(1, segment) - start).clamp_(0, 1 - 2**-53)
    running = weights.double().cumsum_(1)
    return torch.searchsorted(running, share * running[:, -1:], right=True).clamp_(max=weights.shape[1] - 1)


def group_maxima(scores: Tensor, width: int) -> Tensor:
    """[rows, groups] of padded scores. `width` scores that stand far apart make a group."""
    return scores.unflatten(1, (width, -1)).amax(1)


def candidates(scores: Tensor, maxima: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` groups with the greatest maxima [rows, size], and all of their padded scores
    [rows, width * size]: the `size` greatest of the row are among these."""
    groups = maxima.topk(size, dim=1, sorted=False).indices
    table = scores.unflatten(1, (-1, maxima.shape[1]))
    if len(table) == 1:
        return groups, table[0].index_select(1, groups[0]).flatten()[None]
    return groups, table.gather(2, groups[:, None].expand(-1, table.shape[1], -1)).flatten(1)


def narrow(groups: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `likeliest`, from `candidates` of `count` groups: as many as there are candidate groups."""
    size = groups.shape[1]
    values, places = values.topk(size, dim=1, sorted=False)
    ids = places.div(size, rounding_mode="floor").mul_(count) + groups.gather(1, places.remainder(size))
    return _descending(values, ids)


def likeliest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` greatest of each row, descending, and their ids. Of equal ones the lower id comes first, but
    which of those that equal the last are in is not said, unless `size` is everything."""
    if size == scores.shape[1]:
        return _sorted(scores)
    return _descending(*scores.topk(size, dim=1, sorted=False))


def _descending(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of everything, without NaN. On CPUs numpy sorts integers 10 times as fast as torch sorts floats: so
    each becomes one whose upper half orders as its value does, and whose lower half is its place."""
    if values.device.type != "cpu":
        return values.sort(dim=1, descending=True, stable=True)
    bits = (values + 0.0).view(torch.int32)  # -0 equals 0
    bits ^= (bits >> 31).mul_(2**31 - 1).sub_(1)  # the greatest float to the least integer
    keys = bits.long()
    del bits
    keys.bitwise_left_shift_(32).add_(torch.arange(values.shape[1]))
    keys.numpy().sort(axis=1)
    places = keys.bitwise_and_(2**32 - 1)
    return values.gather(1, places), places
