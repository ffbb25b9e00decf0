"""Modules over packed weights: each takes the place of one of torch or transformers.

A weight is packed where it lies (linear.h says how), so the one that was there is gone: the module that held
it must not be used again. Inputs and outputs are bf16 on the CPU.
"""

from __future__ import annotations

from ctypes import byref
from typing import Any

import torch
from torch import nn

from service.engine.cpu.library import Kernels, Weight
from service.engine.cpu.scratch import Scratch
from service.engine.families import is_hooked

ROWS, COLUMNS = 16, 32  # a packed weight's shape is a multiple of


def is_ours(x: torch.Tensor) -> bool:
    """Whether the kernels can read it: bf16 in RAM, its numbers side by side."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.is_contiguous()


def ours(x: torch.Tensor) -> torch.Tensor:
    """`x`; TypeError for what the kernels would read as something else."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu":
        raise TypeError(f"the CPU kernels take bfloat16 on the CPU, and this is {x.dtype} on {x.device}")
    return x


def packable(linear: Any) -> bool:
    """Whether the kernels take a Linear: its numbers are ours, in a shape that blocks and tiles divide."""
    if type(linear) is not nn.Linear or is_hooked(linear):
        return False
    rows, columns = linear.weight.shape
    return all(map(is_ours, linear.parameters())) and not rows % ROWS and not columns % COLUMNS


class Matrix:
    """A Linear's weight, packed in place, and its bias. Keeps both alive."""

    def __init__(self, kernels: Kernels, linear: nn.Linear) -> None:
        self.weight = linear.weight.detach()
        self.bias = linear.bias.detach() if linear.bias is not None else None
        self.n, self.k = self.weight.shape
        kernels.pack(self.weight.data_ptr(), self.n, self.k)
        bias = self.bias.data_ptr() if self.bias is not None else None
        self.c = Weight(self.weight.data_ptr(), bias, self.n, self.k)
        self.pointer = byref(self.c)


class PackedLinear(nn.Module):
    """torch.nn.Linear: [..., k] -> [..., n]."""

    def __init__(self, kernels: Kernels, matrix: Matrix, scratch: Scratch) -> None:
        super().__init__()
        self._kernels, self._matrix, self._scratch = kernels, matrix, scratch
        self.in_features, self.out_features = matrix.k, matrix.n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, k = self._matrix.n, self._matrix.k
        flat = ours(x).reshape(-1, k)
        flat = flat if flat.stride(1) == 1 else flat.contiguous()
        rows = len(flat)
        out = x.new_empty(rows, n)
        scratch = self._scratch.take(self._kernels.linear_scratch(rows, k))
        self._kernels.linear(
            flat.data_ptr(), flat.stride(0), rows, self._matrix.pointer, out.data_ptr(), n, scratch
        )
        return out.view(*x.shape[:-1], n)


class PackedEmbedding(nn.Module):
    """torch.nn.Embedding over a packed matrix that is the head's as well; some models scale what it gives."""

    def __init__(self, kernels: Kernels, matrix: Matrix, scale: torch.Tensor | None) -> None:
        super().__init__()
        self._kernels, self._matrix, self._scale = kernels, matrix, scale

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        n, k = self._matrix.n, self._matrix.k
        flat = ids.reshape(-1).contiguous()
        out = self._matrix.weight.new_empty(len(flat), k)
        self._kernels.rows(self._matrix.c.packed, n, k, flat.data_ptr(), len(flat), out.data_ptr())
        out = out.view(*ids.shape, k)
        return out if self._scale is None else out * self._scale


class PackedMlp(nn.Module):
    """down(activation(gate(x)) * up(x)), without the two inner tensors in memory."""

    def __init__(
        self, kernels: Kernels, gate: Matrix, up: Matrix, down: Matrix, activation: int, scratch: Scratch
    ) -> None:
        super().__init__()
        self._kernels, self._scratch, self._activation = kernels, scratch, activation
        self._gate, self._up, self._down = gate, up, down

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        width = self._gate.k
        flat = ours(x).reshape(-1, width).contiguous()
        rows = len(flat)
        out = x.new_empty(rows, self._down.n)
        scratch = self._scratch.take(self._kernels.gated_scratch(rows, width, self._gate.n))
        self._kernels.gated(
            flat.data_ptr(), width, rows, self._gate.pointer, self._up.pointer, self._down.pointer,
            self._activation, out.data_ptr(), self._down.n, scratch,
        )  # fmt: skip
        return out.view(*x.shape[:-1], self._down.n)


class PackedRmsNorm(nn.Module):
    """LlamaRMSNorm: normed in float32, rounded, times the weight."""

    def __init__(self, kernels: Kernels, norm: Any) -> None:
        super().__init__()
        self._kernels = kernels
        self.weight: nn.Parameter = norm.weight
        self.variance_epsilon: float = norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = ours(x).contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._kernels.rms_norm(
            x.data_ptr(), self.weight.data_ptr(), self.variance_epsilon, x.numel() // width, width,
            out.data_ptr(),
        )  # fmt: skip
        return out
