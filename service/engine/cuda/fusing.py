"""Puts fused layers in the place of a model's own, wherever the kernels compute what they do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from service.engine.cuda.decoder import FusedStack, Kernels, fusible
from service.engine.cuda.library import LEAST_CAPABILITY, CannotCompile, CudaKernels
from service.engine.proof import KernelsDiffer, Shortened, prove

log = logging.getLogger(__name__)


class Fused:
    """What was fused of a model. Weights stay where they are, so that it can be undone."""

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and len(child) and all(fusible(x) for x in child)
        ]

    def __bool__(self) -> bool:
        return bool(self._places)

    @property
    def dtype(self) -> torch.dtype:
        return next(self._places[0][2].parameters()).dtype

    def apply(self, kernels: Kernels) -> None:
        for parent, name, layers in self._places:
            setattr(parent, name, nn.ModuleList([FusedStack(kernels, [*layers])]))

    def undo(self) -> None:
        for parent, name, layers in self._places:
            setattr(parent, name, layers)


def fuse(
    model: Any, runner: Shortened, device: torch.device, make: Callable[..., Kernels] = CudaKernels
) -> None:
    """Fuse the layers of a model that is whole on one GPU. Where that cannot be, or would compute something
    else, the log says so and the model stays as it is. Call it when the model's attention is connected."""
    fused = Fused(model)
    if not fused or torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return
    try:
        kernels = make(device, fused.dtype)
    except CannotCompile as error:
        log.warning("the GPU kernels are not compiled, torch computes alone: %s", error)
        return
    try:
        prove(runner, lambda: fused.apply(kernels), "--gpu-kernels off")
    except KernelsDiffer as error:
        fused.undo()
        log.error("torch computes alone: %s", error)
        return
    log.info("GPU kernels: the decoder layers are fused")
