"""Runs a streamed model: the body once, hearing every decoder layer, then the head by blocks of rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from exporter.logits.divergence import Distance, Divergence
from exporter.logits.streamed import Streamed
from exporter.logits.variants import VARIANTS, NotComparable

if TYPE_CHECKING:
    import torch

# Rows of the head at a time, for all tokens of all variants: 3 MB of logits.
HEAD_ROWS = 2048

# (decoder layer, by how much its output differs)
Report = Callable[[str, float], None]


class Forward:
    """One forward of the prompts of all variants, in a batch in the order of VARIANTS.

    `ids` are [prompts, tokens]; `is_real` says which of them are no padding. Padding stands behind a prompt,
    where nothing before it sees it: every model here is causal.
    """

    def __init__(self, model: Any, where: str, ids: torch.Tensor, is_real: torch.Tensor) -> None:
        self._model, self._where = model, where
        self._ids, self._is_real = ids.repeat(len(VARIANTS), 1), is_real
        self.layers: list[tuple[str, float]] = []

    def body(self, report: Report) -> Any:
        """The output of everything below the head. `layers` has every decoder layer's difference then."""
        hooks = [
            layer.register_forward_hook(partial(self._hear, name, report))
            for name, layer in decoder_layers(self._model).items()
        ]
        base = self._model.base_model
        positions = _positions(self._ids)
        takes = inspect.signature(base.forward).parameters
        given = {"position_ids": positions} if "position_ids" in takes else {}
        try:
            return base(input_ids=self._ids, use_cache=False, **given)
        finally:
            for hook in hooks:
                hook.remove()

    def head(self, body: Any) -> tuple[Distance, Distance]:
        """(merged from base + adapter, base from base + adapter), of the logits of all real tokens."""
        weight = self._head_weight()
        setattr(self._model, self._model.base_model_prefix, _replay(body))
        tokens = int(self._is_real.sum())
        merged, base = Divergence(tokens), Divergence(tokens)
        for first in range(0, weight.shape[0], HEAD_ROWS):
            weight.window = (first, min(first + HEAD_ROWS, weight.shape[0]))
            logits = self._model(input_ids=self._ids, use_cache=False).logits
            of_merged, of_adapted, of_base = (part[self._is_real] for part in logits.chunk(len(VARIANTS)))
            merged.add(first, of_adapted, of_merged)
            base.add(first, of_adapted, of_base)
        return merged.distance(), base.distance()

    def _head_weight(self) -> Streamed:
        head = self._model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        if not isinstance(weight, Streamed) or self._model.base_model is self._model:
            raise NotComparable(self._where, "it has no head that is a matrix beside its body")
        return weight

    def _hear(self, name: str, report: Report, _module: Any, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        merged, adapted, _ = (part[self._is_real].double() for part in hidden.chunk(len(VARIANTS)))
        difference = float(((merged - adapted).norm(dim=-1) / adapted.norm(dim=-1)).mean())
        self.layers.append((name, difference))
        report(name, difference)


def decoder_layers(model: Any) -> Mapping[str, Any]:
    """The decoder layers by their names: the first list of modules that is met from the outside."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList):
            return {f"{name}.{number}": layer for number, layer in enumerate(module)}
    return {}


def _positions(ids: torch.Tensor) -> torch.Tensor:
    """Positions of the tokens, for every row of the batch: one row for all would not be a batch."""
    import torch

    return torch.arange(ids.shape[1]).repeat(len(ids), 1)


def _replay(body: Any) -> Any:
    """A module that gives what the body gave, whatever it is called with."""
    import torch

    class Replay(torch.nn.Module):
        def forward(self, *_: Any, **__: Any) -> Any:
            return body

        def __getattr__(self, name: str) -> Any:  # OPT's head calls the body's decoder
            return self

    return Replay()
