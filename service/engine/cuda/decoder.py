"""The decoder layers of the Llama kind on a GPU, a few launches each: Llama, Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from service.engine.attention import Layer as AttentionLayer
from service.engine.attention import layer_of
from service.engine.backends import Paged
from service.engine.cuda.library import DTYPES, FEW_ROWS, LOAD_BYTES, MOST_WIDTH, VECTOR, CudaKernels
from service.engine.families import ATTENTION, GATED_MLP, LLAMA_KINDS, SILU, activation_of, is_hooked

Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin of the step's positions, [1, tokens, head_dim]


def fusible(layer: Any) -> bool:
    """Whether the kernels compute this layer as its class does."""
    if type(layer).__name__ not in LLAMA_KINDS or any(map(is_hooked, layer.modules())):
        return False
    attention = layer_of(layer.self_attn)
    linears = [getattr(layer.self_attn, name) for name in ATTENTION]
    linears += [getattr(layer.mlp, name) for name in GATED_MLP]
    widths = [layer.self_attn.head_dim, *(x.in_features for x in linears if type(x) is nn.Linear)]
    return (
        attention is not None
        and isinstance(attention.backend, Paged)
        and activation_of(layer.mlp) == SILU
        and all(type(x) is nn.Linear for x in linears)
        and len({(x.device, x.dtype) for x in layer.parameters()}) == 1
        and layer.input_layernorm.weight.dtype in DTYPES
        and layer.input_layernorm.weight.numel() <= MOST_WIDTH
        and not any(width % VECTOR for width in widths)
        and not any(x.data_ptr() % LOAD_BYTES or not x.is_contiguous() for x in layer.parameters())
    )


class FusedLayer:
    """One layer over its own weights, which stay where they are."""

    def __init__(self, kernels: CudaKernels, layer: Any) -> None:
        own, mlp = layer.self_attn, layer.mlp
        attention = layer_of(own)
        assert attention is not None  # as `fusible` has seen
        self.attention: AttentionLayer = attention
        self._kernels = kernels
        *self._qkv, self._o = (getattr(own, name) for name in ATTENTION)
        self._gate, self._up, self._down = (getattr(mlp, name) for name in GATED_MLP)
        self._norm1, self._norm2 = layer.input_layernorm, layer.post_attention_layernorm
        self._eps: float = self._norm1.variance_epsilon
        self._head_norms = tuple(
            getattr(getattr(own, name, None), "weight", None) for name in ("q_norm", "k_norm")
        )
        self._head_dim, self._scale = own.head_dim, own.scaling

    def __call__(self, hidden: torch.Tensor, delta: torch.Tensor | None, tables: Tables) -> torch.Tensor:
        """hidden [tokens, width] becomes what it is before the MLP is added to it; that is what returns."""
        normed = self._kernels.add_rms_norm(hidden, delta, self._norm1.weight, self._eps)
        del delta  # the MLP's tensors may have its place
        (attended,) = self._products(self._attend(normed, tables), [self._o])
        normed = self._kernels.add_rms_norm(hidden, attended, self._norm2.weight, self._eps)
        del attended
        (out,) = self._products(self._gated(normed), [self._down])
        return out

    def _attend(self, normed: torch.Tensor, tables: Tables) -> torch.Tensor:
        batch, backend = self.attention.batch(), self.attention.backend
        store = backend.store  # Paged, as `fusible` has seen: a slot's keys lie side by side
        q, k, v = (x.view(len(normed), -1, self._head_dim) for x in self._products(normed, self._qkv))
        q_norm, k_norm = self._head_norms
        self._kernels.rotate_and_store(
            q, k, v, tables, (q_norm, k_norm), self._eps, batch.slots[store.group], (store.keys, store.values)
        )
        return backend.attend(q, batch, self._scale, None).view(len(normed), -1)

    def _gated(self, normed: torch.Tensor) -> torch.Tensor:
        if len(normed) in FEW_ROWS:
            return self._kernels.times_gated(normed, self._gate, self._up)
        gate, up = self._products(normed, (self._gate, self._up))
        return self._kernels.silu_times(gate, up)

    def _products(self, x: torch.Tensor, linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
        if len(x) in FEW_ROWS:
            return self._kernels.times_matrices(x, linears)
        return [linear(x, module.weight, module.bias) for module in linears]


class FusedStack(nn.Module):
    """All layers of a model: [1, tokens, hidden] in, the same memory out."""

    def __init__(self, kernels: CudaKernels, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self._kernels = kernels
        self._fused = [FusedLayer(kernels, layer) for layer in layers]

    def forward(self, hidden_states: torch.Tensor, position_embeddings: Tables, **_more: Any) -> torch.Tensor:
        hidden = hidden_states[0].contiguous()
        cos, sin = (x[0].contiguous() for x in position_embeddings)
        delta: torch.Tensor | None = None
        with self._kernels.here():
            for layer in self._fused:
                delta = layer(hidden, delta, (cos, sin))
        assert delta is not None
        return hidden.add_(delta)[None]
