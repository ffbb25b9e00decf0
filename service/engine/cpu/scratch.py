"""Memory in which a kernel works: one buffer, for all modules of a model in turn."""

from __future__ import annotations

import torch


class Scratch:
    """Grows to what the largest step needs, which is the rehearsal's; then it stays. One thread uses it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.bfloat16)

    @property
    def n_bytes(self) -> int:
        return self._buffer.nbytes

    def take(self, elements: int) -> int:
        """The address of that many bf16 numbers, with anything in them. The next call gives the same."""
        if elements > len(self._buffer):
            self._buffer = torch.empty(0, dtype=torch.bfloat16)  # the old one goes before the new one comes
            self._buffer = torch.zeros(elements, dtype=torch.bfloat16)
        return self._buffer.data_ptr()
