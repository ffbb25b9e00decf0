"""exporter/logits/divergence.py: block by block it finds what whole logits would show."""

import math

import pytest
import torch

from exporter.logits.divergence import Divergence, Logits


def seen(reference, other, width=7):
    divergence = Divergence(len(reference))
    for first in range(0, reference.shape[1], width):
        divergence.add(first, reference[:, first : first + width], other[:, first : first + width])
    return divergence.distance()


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_blocks_give_what_whole_logits_give(scale):
    torch.manual_seed(0)
    reference = torch.randn(9, 50) * scale
    other = reference + torch.randn(9, 50) * scale / 3
    wide, wide_other = reference.double(), other.double()
    likely, other_likely = wide.log_softmax(-1), wide_other.log_softmax(-1)
    found = seen(reference, other)
    difference = wide_other - wide
    assert found.relative == pytest.approx(float((difference.norm(dim=-1) / wide.norm(dim=-1)).mean()))
    assert found.largest == pytest.approx(float(difference.abs().max()))
    assert found.kl == pytest.approx(float((likely.exp() * (likely - other_likely)).sum(-1).mean()))
    assert found.top1 == float((wide.argmax(-1) == wide_other.argmax(-1)).double().mean())
    assert 0 < found.top1 < 1


def test_the_same_logits_are_no_distance_apart():
    logits = torch.randn(5, 30)
    found = seen(logits, logits)
    assert (found.relative, found.largest, found.top1) == (0, 0, 1)
    assert found.kl == pytest.approx(0, abs=1e-12)


def test_logits_that_are_all_zero_have_a_distance():
    assert seen(torch.zeros(2, 9), torch.zeros(2, 9)).relative == 0


def test_large_logits_do_not_overflow():
    logits = Logits(1)
    for first in range(0, 4000, 1000):
        logits.add(first, torch.arange(first, first + 1000, dtype=torch.float64).view(1, -1))
    assert float(logits.log_sum_exp) == pytest.approx(3999 - math.log(1 - math.exp(-1)))
    assert int(logits.best) == 3999


def test_a_value_that_is_not_a_number_is_not_lost_in_later_blocks():
    broken = torch.zeros(3, 30)
    broken[1, 2] = torch.nan
    assert math.isnan(seen(torch.ones(3, 30), broken).largest)
