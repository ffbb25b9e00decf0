"""Decoder layers that are like an earlier one, and a forward that leaves them out.

Layers run one after the other and keep nothing but their keys and values, which are allocated before. So a
pass through one layer of each kind takes the memory of a pass through all, in a fraction of the time.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from loader.kv_layout import KvLayout
from service.engine.cpu.decoder import PackedStack


class Repeats:
    """Of one model, as it is now: what is made of a layer later, by packing it, is of the same kind."""

    def __init__(self, model: nn.Module, layout: KvLayout) -> None:
        self._model = model
        groups = {index: at for at, group in enumerate(layout.groups) for index in group.layers}
        self._layers = _layers(model, len(groups))
        self._kinds = [(groups[at], _kind(layer)) for at, layer in enumerate(self._layers)]

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """A repeated layer gives what it is given, unless the first of its kind gives anything else than one
        tensor of that shape."""
        kinds: dict[Hashable, _Kind] = {}
        with ExitStack() as restored:
            for module in self._model.modules():
                if isinstance(module, PackedStack):  # it has taken the place of the list
                    restored.enter_context(module.repeats_left_out())
            for layer, kind in zip(self._layers, self._kinds, strict=True):
                first = kind not in kinds
                known = kinds.setdefault(kind, _Kind())
                wrap = known.watched if first else known.skipped
                restored.enter_context(_replaced(layer, wrap(layer.forward)))
            yield


class _Kind:
    """Layers that are alike."""

    def __init__(self) -> None:
        self._plain = False  # one tensor in, another of its shape out

    def watched(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *rest: Any, **options: Any) -> Any:
            shape = hidden_states.shape
            out = forward(hidden_states, *rest, **options)
            self._plain = isinstance(out, torch.Tensor) and out.shape == shape
            return out

        return run

    def skipped(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: torch.Tensor, *rest: Any, **options: Any) -> Any:
            return hidden_states if self._plain else forward(hidden_states, *rest, **options)

        return run


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own


def _layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The list whose members attend, each as the layer of its place; an empty one where there is none."""
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len(module) != count:
            continue
        if all(_attends_as(at, member) for at, member in enumerate(module)):
            return module
    return nn.ModuleList()


def _attends_as(index: int, member: nn.Module) -> bool:
    return index in [getattr(part, "layer_idx", None) for part in member.modules()]


def _kind(layer: nn.Module) -> Hashable:
    parts = tuple((name, type(part).__qualname__) for name, part in layer.named_modules())
    tensors = tuple(
        (name, tuple(tensor.shape), tensor.dtype, tensor.device)
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
    )
    return parts, tensors
