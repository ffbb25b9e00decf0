import random
import string

import psutil
import pytest
import torch

from loader.errors import OutOfMemory, OverBudget
from service import boot
from service.backend import Progress
from service.boot import check_against_plan
from service.planning import make_plan_for
from service.settings import Settings


def test_planned_and_measured_are_logged_side_by_side(plan, service_log):
    check_against_plan(plan, {"cpu": 684})
    assert "cpu: planned peak 760 bytes, measured 684 (90 %), budget 1,000" in service_log.text


def test_nothing_is_served_when_the_measured_peak_is_over_the_budget(plan):
    with pytest.raises(OverBudget, match="measured 1,001 bytes against a budget of 1,000") as refused:
        check_against_plan(plan, {"cpu": 1001})
    assert refused.value.exit_code == 43


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("arena"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
        ),
    ],
)
def test_running_out_of_memory_is_told_with_what_was_planned(plan, monkeypatch, error):
    def fail(_settings, _plan, progress, opened):
        opened.callback(closed.append, True)
        progress.enter("reading weights")
        raise error

    closed = []
    monkeypatch.setattr(boot, "_open", fail)
    with pytest.raises(
        OutOfMemory, match="while reading weights; the plan counted on a peak of 760"
    ) as refused:
        boot.start_backend(Settings(), plan, Progress())
    assert refused.value.exit_code == 43
    assert closed == [True]


def test_a_device_that_was_not_measured_is_not_compared(plan, service_log):
    check_against_plan(plan, {"disk": 5})
    assert "planned peak" not in service_log.text


def test_a_tokenizer_does_not_remember_every_word_that_it_met():
    """Each takes up to 8 kB; 10,000 of them, as many as it would by itself, more than the plan's reserve."""
    tokenizer, rng = boot._tokenizer(make_plan_for(Settings())), random.Random(0)
    before = psutil.Process().memory_info().rss
    for _ in range(100):
        tokenizer.encode(" ".join("".join(rng.choices(string.ascii_lowercase, k=250)) for _ in range(100)))
    assert psutil.Process().memory_info().rss - before < 40 << 20
