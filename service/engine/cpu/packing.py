"""Puts packed modules in the place of a model's own, wherever the kernels compute what they do."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from service.engine.attention import layer_of
from service.engine.cpu.attention import NativeAttention
from service.engine.cpu.decoder import PackedDecoderLayer, PackedStack, fusible
from service.engine.cpu.library import Kernels
from service.engine.cpu.modules import (
    Matrix,
    PackedEmbedding,
    PackedLinear,
    PackedMlp,
    PackedRmsNorm,
    is_ours,
    packable,
)
from service.engine.cpu.scratch import Scratch
from service.engine.families import GATED_MLP, activation_of, is_hooked

# The lines by which a class is known, whatever family it is from.
_MLP_LINE = "self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))"
_SCALE_LINE = "return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)"
_NORM_LINE = "return self.weight * hidden_states.to(input_dtype)"


def pack(model: Any, kernels: Kernels) -> None:
    """Pack every weight that the kernels take, in place; the model cannot be unpacked again.

    Call it when the model's attention is connected. What is in another dtype stays as it is, and so do
    modules with accelerate's hooks: their weights come and go.
    """
    scratch = Scratch()
    _pack_head(model, kernels, scratch)
    shared = _shared(model)
    for parent, name, module in _children(model):
        # A matrix that is read in another place too, in a way of its own, must stay what it is.
        packed = None if shared & _addresses(module) else _packed(module, kernels, scratch)
        if packed is not None:
            setattr(parent, name, packed)
    for parent, name, module in list(_children(model)):
        if isinstance(module, nn.ModuleList) and {type(x) for x in module} == {PackedDecoderLayer}:
            setattr(parent, name, nn.ModuleList([PackedStack(kernels, [*module], scratch)]))


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Every module with its parent, parents first; what was replaced is not looked into any more."""
    for name, child in list(model._modules.items()):
        if child is None:
            continue
        yield model, name, child
        yield from _children(getattr(model, name))


def _addresses(module: nn.Module) -> set[int]:
    return {parameter.data_ptr() for parameter in module.parameters()}


def _shared(model: nn.Module) -> set[int]:
    """Where parameters lie that more than one place in the model has."""
    owners = Counter(
        parameter.data_ptr()
        for _, module in model.named_modules(remove_duplicate=False)
        for parameter in module.parameters(recurse=False)
    )
    return {address for address, count in owners.items() if count > 1}


def _packed(module: Any, kernels: Kernels, scratch: Scratch) -> nn.Module | None:
    if fusible(module):
        attention = layer_of(module.self_attn)
        if attention is not None and isinstance(attention.backend, NativeAttention):
            return PackedDecoderLayer(kernels, module, attention, scratch)
    if _is_gated_mlp(module):
        activation = activation_of(module)
        assert activation is not None  # as _is_gated_mlp has seen
        gate, up, down = (Matrix(kernels, getattr(module, name)) for name in GATED_MLP)
        return PackedMlp(kernels, gate, up, down, activation, scratch)
    if packable(module):
        assert isinstance(module, nn.Linear)
        return PackedLinear(kernels, Matrix(kernels, module), scratch)
    return PackedRmsNorm(kernels, module) if _is_rms_norm(module) else None


def _pack_head(model: Any, kernels: Kernels, scratch: Scratch) -> None:
    """The head, and with it an embedding that is the same matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    if not tied or not packable(head) or is_hooked(embedding):
        return
    if type(embedding) is not nn.Embedding and _SCALE_LINE not in _source(embedding):
        return
    matrix = Matrix(kernels, head)
    scale = getattr(embedding, "embed_scale", None)
    scale = scale.to(torch.bfloat16) if isinstance(scale, torch.Tensor) else scale
    model.set_output_embeddings(PackedLinear(kernels, matrix, scratch))
    model.set_input_embeddings(PackedEmbedding(kernels, matrix, scale))


def _is_gated_mlp(module: Any) -> bool:
    return (
        not is_hooked(module)
        and all(packable(getattr(module, name, None)) for name in GATED_MLP)
        and activation_of(module) is not None
        and _MLP_LINE in _source(module)
    )


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not is_ours(weight) or is_hooked(module):
        return False
    return hasattr(module, "variance_epsilon") and _NORM_LINE in _source(module)


def _source(module: nn.Module) -> str:
    try:
        return inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return ""
