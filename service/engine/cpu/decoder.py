"""A whole decoder layer of the Llama kind in one call: Llama, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import c_int64
from typing import Any

import torch
from torch import nn

from service.engine.attention import Layer as AttentionLayer
from service.engine.batch import Batch
from service.engine.cpu import library
from service.engine.cpu.attention import NativeAttention
from service.engine.cpu.library import Kernels
from service.engine.cpu.modules import Matrix, is_ours, ours, packable
from service.engine.cpu.scratch import Scratch
from service.engine.families import ATTENTION, GATED_MLP, LLAMA_KINDS, SILU, activation_of, is_hooked

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin of the step's positions, [1, tokens, head_dim]


def fusible(layer: Any) -> bool:
    """Whether the kernels compute this layer as its class does."""
    if type(layer).__name__ not in LLAMA_KINDS or any(map(is_hooked, layer.modules())):
        return False
    linears = [getattr(layer.self_attn, name) for name in ATTENTION]
    linears += [getattr(layer.mlp, name) for name in GATED_MLP]
    return (
        activation_of(layer.mlp) == SILU
        and all(map(packable, linears))
        and all(map(is_ours, layer.parameters()))
    )


class PackedDecoderLayer(nn.Module):
    """[1, tokens, hidden] in, the same memory out: the input is overwritten."""

    def __init__(self, kernels: Kernels, layer: Any, attention: AttentionLayer, scratch: Scratch) -> None:
        super().__init__()
        backend = attention.backend
        assert isinstance(backend, NativeAttention)
        self.attention: AttentionLayer = attention
        self.group = backend.store.group
        own, mlp = layer.self_attn, layer.mlp
        self._matrices = {
            name.removesuffix("_proj"): Matrix(kernels, getattr(part, name))
            for part, names in ((own, ATTENTION), (mlp, GATED_MLP))
            for name in names
        }
        norms = {
            "norm1": layer.input_layernorm,
            "norm2": layer.post_attention_layernorm,
            "q_norm": getattr(own, "q_norm", None),
            "k_norm": getattr(own, "k_norm", None),
        }
        found = {name: norm for name, norm in norms.items() if norm is not None}
        self.norms = nn.ModuleDict(found)
        self.c = library.Layer(
            **{name: matrix.c for name, matrix in self._matrices.items()},
            **{name: norm.weight.data_ptr() for name, norm in found.items()},
            k_pool=backend.store.keys.data_ptr(),
            v_pool=backend.store.values.data_ptr(),
            heads=self._matrices["q"].n // own.head_dim,
            kv_heads=backend.store.keys.shape[1],
            head_dim=own.head_dim,
            eps=layer.input_layernorm.variance_epsilon,
            scale=own.scaling,
            window=backend.store.window or 0,
        )
        self._run = _Run(kernels, (self,), scratch)

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Tables, **_more: Any) -> torch.Tensor:
        return self._run(hidden_states, position_embeddings)


class PackedStack(nn.Module):
    """All layers of a model in one call, so that Python is not asked between them."""

    def __init__(self, kernels: Kernels, layers: Sequence[PackedDecoderLayer], scratch: Scratch) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        firsts = {layer.group: layer for layer in reversed(layers)}
        self._run = self._whole = _Run(kernels, layers, scratch)
        self._firsts = _Run(kernels, [*firsts.values()], scratch)

    @contextmanager
    def repeats_left_out(self) -> Iterator[None]:
        """Meanwhile only the first layer of each group computes: they are of one shape."""
        self._run = self._firsts
        try:
            yield
        finally:
            self._run = self._whole

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Tables, **_more: Any) -> torch.Tensor:
        return self._run(hidden_states, position_embeddings)


class _Run:
    """Some layers, one after the other, of one shape and over the same positions."""

    def __init__(self, kernels: Kernels, layers: Sequence[PackedDecoderLayer], scratch: Scratch) -> None:
        self._kernels, self._scratch, self._count = kernels, scratch, len(layers)
        self._attention = layers[0].attention
        self._groups = sorted({layer.group for layer in layers})
        self._layers = (library.Layer * len(layers))(*(layer.c for layer in layers))
        self._steps_of = (c_int64 * len(layers))(*(self._groups.index(layer.group) for layer in layers))

    def __call__(self, hidden_states: torch.Tensor, position_embeddings: Tables) -> torch.Tensor:
        hidden, cos, sin = (ours(x).contiguous() for x in (hidden_states, *position_embeddings))
        tokens, width = hidden.shape[1:]
        scratch = self._scratch.take(self._scratch_elements(tokens, width))
        batch = self._attention.batch()
        steps = [_step(batch, group, cos, sin, scratch) for group in self._groups]
        self._kernels.layers(
            self._layers, self._steps_of, self._count, (library.Step * len(steps))(*steps), hidden.data_ptr()
        )
        return hidden

    def _scratch_elements(self, tokens: int, width: int) -> int:
        c = self._layers[0]
        q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim
        elements: int = self._kernels.layer_scratch(tokens, width, q_width, kv_width, c.up.n)
        return elements


def _step(batch: Batch, group: int, cos: torch.Tensor, sin: torch.Tensor, scratch: int) -> library.Step:
    table = batch.tables[group]
    return library.Step(
        tokens=batch.ids.shape[1],
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        slots=batch.slots[group].data_ptr(),
        tables=table.data_ptr(),
        table_stride=table.stride(0),
        cu_seqlens=batch.cu_tokens.data_ptr(),
        starts=batch.starts.data_ptr(),
        sequences=len(batch.starts),
        scratch=scratch,
    )
