"""Checkpoints that look real and take no disk: right headers, and data that is a hole in a sparse file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol

import pytest

from loader.headers import DTYPE_BITS

# name -> (dtype, shape), in the order in which they are written
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]

QWEN2_7B = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 152_064, "hidden_size": 3584,
    "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "max_position_embeddings": 32_768, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
LLAMA3_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192,
    "intermediate_size": 28_672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
    "max_position_embeddings": 131_072, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 64, "hidden_size": 16,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 128, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip


class FakeCheckpoint(Protocol):
    """Writes a folder that reads as a checkpoint, and returns it.

    `tensors` are those of the config's architecture unless given. More than one of `shards` get an index.
    """

    def __call__(
        self, folder: Path, config: Mapping[str, Any], tensors: Tensors | None = None, shards: int = 1
    ) -> Path: ...


@pytest.fixture(scope="session")
def fake_checkpoint() -> FakeCheckpoint:
    return write_checkpoint


@pytest.fixture(scope="session")
def configs() -> Mapping[str, dict[str, Any]]:
    """config.json by name: "tiny", "qwen2-7b" (Qwen2.5-7B) and "llama3-70b" (Llama-3.1-70B)."""
    return {"tiny": TINY, "qwen2-7b": QWEN2_7B, "llama3-70b": LLAMA3_70B}


def write_checkpoint(
    folder: Path, config: Mapping[str, Any], tensors: Tensors | None = None, shards: int = 1
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = dict(decoder_tensors(config) if tensors is None else tensors)
    if shards == 1:
        write_sparse(folder / "model.safetensors", names)
        return folder
    parts = list(_split(names, shards))
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_sparse(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    total = sum(n_bytes(*tensor) for tensor in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_sparse(file: Path, tensors: Tensors) -> Path:
    """A safetensors file whose data is never written: it reads as zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + n_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return file


def n_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BITS[dtype] // 8


def decoder_tensors(config: Mapping[str, Any], dtype: str = "BF16") -> Tensors:
    """The tensors of a Llama-like decoder; a Qwen2 has biases in attention."""
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, kv = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        shapes[f"{at}.input_layernorm.weight"] = (hidden,)
        for name, width in (("q", query), ("k", kv), ("v", kv)):
            shapes[f"{at}.self_attn.{name}_proj.weight"] = (width, hidden)
            if config["model_type"] == "qwen2":
                shapes[f"{at}.self_attn.{name}_proj.bias"] = (width,)
        shapes[f"{at}.self_attn.o_proj.weight"] = (hidden, query)
        shapes[f"{at}.post_attention_layernorm.weight"] = (hidden,)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
            shapes[f"{at}.mlp.{name}_proj.weight"] = shape
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (vocab, hidden)
    return {name: (dtype, shape) for name, shape in shapes.items()}


def _split(tensors: Tensors, parts: int) -> Iterator[Tensors]:
    """The same number of tensors in each part, but for the last."""
    names = list(tensors)
    size = -(-len(names) // parts)
    for start in range(0, len(names), size):
        yield {name: tensors[name] for name in names[start : start + size]}
