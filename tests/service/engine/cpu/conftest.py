import pytest
import torch

from service.engine.cpu.scratch import Scratch


class MarkedScratch(Scratch):
    """With a mark behind all that was ever asked for."""

    def __init__(self):
        super().__init__()
        self.marks = []

    def take(self, elements):
        buffer = torch.full((elements + 512,), 7, dtype=torch.bfloat16)
        self.marks.append(buffer[elements:])
        return buffer.data_ptr()

    @property
    def kept(self):
        return bool(self.marks) and all(bool((mark == 7).all()) for mark in self.marks)


@pytest.fixture
def marked_scratch():
    return MarkedScratch()
