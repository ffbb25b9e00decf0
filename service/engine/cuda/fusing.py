"""Puts fused layers in the place of a model's own, wherever the kernels compute what they do."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from service.engine.cuda.decoder import FusedStack, fusible
from service.engine.cuda.library import LEAST_CAPABILITY, CannotCompile, CudaKernels, LaunchFailed
from service.engine.proof import KernelsDiffer, Shortened, prove

SWITCH = "--gpu-kernels off"

log = logging.getLogger(__name__)


class Fused:
    """What was fused of a model. Weights stay where they are, so that it can be undone."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._places = [
            (parent, name, child)
            for parent in model.modules()
            for name, child in parent.named_children()
            if isinstance(child, nn.ModuleList) and _is_fusible(child, device)
        ]
        self._kernels: CudaKernels | None = None

    def __bool__(self) -> bool:
        return bool(self._places)

    @property
    def dtype(self) -> torch.dtype:
        return next(self._places[0][2].parameters()).dtype

    def apply(self, kernels: CudaKernels) -> None:
        self._kernels = kernels
        for parent, name, layers in self._places:
            setattr(parent, name, nn.ModuleList([FusedStack(kernels, [*layers])]))

    def close(self) -> None:
        """Put the layers back; nothing may be computed with the fused ones any more. Idempotent."""
        for parent, name, layers in self._places:
            setattr(parent, name, layers)
        if self._kernels is not None:
            self._kernels.close()
        self._places, self._kernels = [], None


def fuse(
    model: Any, runner: Shortened, device: torch.device, make: Callable[..., CudaKernels] = CudaKernels
) -> Fused | None:
    """Fuse the layers of a model that is whole on one GPU; whoever asked closes what is returned.

    Where that cannot be, or would compute something else, the log says so and the model stays as it is. Call
    it when the model's attention is connected.
    """
    fused = Fused(model, device)
    if not fused:
        log.info("GPU kernels: none, they do not know these layers, or not all of them are on %s", device)
        return None
    if (found := torch.cuda.get_device_capability(device)) < LEAST_CAPABILITY:
        log.info("GPU kernels: none, %s has compute capability %s.%s, they want %s.%s",
                 device, *found, *LEAST_CAPABILITY)  # fmt: skip
        return None
    try:
        prove(runner, lambda: fused.apply(make(device, fused.dtype)), SWITCH)
    except (CannotCompile, LaunchFailed, KernelsDiffer, OSError) as error:
        fused.close()
        log.error("GPU kernels: none, torch computes alone: %s", error)
        return None
    except BaseException:
        fused.close()
        raise
    log.info("GPU kernels: the decoder layers are fused")
    return fused


def _is_fusible(layers: nn.ModuleList, device: torch.device) -> bool:
    kinds = {(x.device, x.dtype) for x in layers.parameters()}
    return len(kinds) == 1 and next(iter(kinds))[0] == device and all(fusible(layer) for layer in layers)
