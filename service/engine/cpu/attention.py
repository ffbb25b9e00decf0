"""Attention by the compiled kernels: bf16 on the CPU, blocks are read where they lie, each of them once."""

from __future__ import annotations

import torch

from service.engine.batch import Batch
from service.engine.cpu.library import kernels
from service.engine.pool import LayerShape, LayerStore, Shapes

BLOCK_TOKENS = 32  # that the kernels are made for
HEAD_DIM_STEP, HEAD_DIM = 32, 256


class NativeAttention:
    """Keys [blocks, kv_heads, 32, head_dim], values [blocks, kv_heads, head_dim, 32] (attention.cpp).

    A token's attention does not depend on what else is in the batch.
    """

    recordable = False

    def __init__(self, store: LayerStore) -> None:
        found = kernels()
        assert found is not None  # serves() has seen them
        self.store = store
        self._kernels = found
        self._keys, self._values = store.keys.data_ptr(), store.values.data_ptr()
        self._kv_heads, self._head_dim = store.keys.shape[1], store.keys.shape[3]

    @staticmethod
    def serves(layer: LayerShape, block_tokens: int) -> bool:
        return (
            layer.device.type == "cpu"
            and layer.dtype == torch.bfloat16
            and layer.head_dim % HEAD_DIM_STEP == 0
            and layer.head_dim <= HEAD_DIM
            and block_tokens == BLOCK_TOKENS
            and kernels() is not None
        )

    @staticmethod
    def shapes(layer: LayerShape, blocks: int, block_tokens: int) -> Shapes:
        return (
            (blocks, layer.kv_heads, block_tokens, layer.head_dim),
            (blocks, layer.kv_heads, layer.head_dim, block_tokens),
        )

    def write(self, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        key, value = _rows(key), _rows(value)
        self._kernels.store_kv(
            key.data_ptr(), key.stride(0), key.stride(1),
            value.data_ptr(), value.stride(0), value.stride(1),
            batch.slots[self.store.group].data_ptr(), key.shape[0], self._kv_heads, self._head_dim,
            self._keys, self._values,
        )  # fmt: skip

    def attend(self, query: torch.Tensor, batch: Batch, scale: float, softcap: float | None) -> torch.Tensor:
        query = _rows(query)
        tokens, heads, head_dim = query.shape
        tables = batch.tables[self.store.group]
        output = torch.empty(tokens, heads, head_dim, dtype=query.dtype)
        self._kernels.attention(
            query.data_ptr(), query.stride(0), query.stride(1), self._keys, self._values,
            tables.data_ptr(), tables.shape[1], batch.cu_tokens.data_ptr(), batch.starts.data_ptr(),
            tables.shape[0], heads, self._kv_heads, head_dim, scale, self.store.window or 0, softcap or 0.0,
            output.data_ptr(), heads * head_dim,
        )  # fmt: skip
        return output


def _rows(x: torch.Tensor) -> torch.Tensor:
    """With the elements of a head side by side, as the kernels read them; nearly always as it is."""
    return x if x.stride(2) == 1 else x.contiguous()
