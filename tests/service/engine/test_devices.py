"""Which device it is, and whether it still computes."""

import pytest
import torch

from service.engine.devices import check_device, numbered, out_of_memory
from service.engine.types import DeviceLost


def test_a_gpu_without_a_number_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert numbered(torch.device("cuda")) == torch.device("cuda:3")
    assert numbered(torch.device("cuda:1")) == torch.device("cuda:1")
    assert numbered(torch.device("cpu")) == torch.device("cpu")


def test_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**50, dtype=torch.uint8)  # more than any machine has
    assert type(refused.value) is RuntimeError, "torch has a type for it now: choose by that"
    for error in (refused.value, torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
        assert out_of_memory(error)
    for error in (
        RuntimeError("shapes do not fit"),
        ValueError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert not out_of_memory(error)


def test_a_device_that_can_add_is_not_lost():
    check_device(torch.device("cpu"))


def test_a_device_that_cannot_add_is_lost():
    with pytest.raises(DeviceLost, match="meta answers nothing any more"):
        check_device(torch.device("meta"))
