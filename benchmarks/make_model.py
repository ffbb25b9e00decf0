"""Writes a model of a real shape with random weights: python -m benchmarks.make_model 0.5b OUT.

The shapes are those of the Qwen2.5 checkpoints and of Llama 3.1 70B (their published config.json). Weights
are normal with the family's initializer_range in bf16, written shard by shard: the 7B (15.23 GB) needs
300 MB of memory.
The tokenizer has an entry for every id of the vocabulary: each byte is a token, and so every ASCII prompt of
N characters has N tokens and every id decodes to text.
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARD_BYTES = 2_000_000_000
ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class Shape:
    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    family: str = "qwen2"


SHAPES = {
    "tiny": Shape(64, 2, 128, 4, 2, 1024, True),
    "0.5b": Shape(896, 24, 4864, 14, 2, 151_936, True),
    "1.5b": Shape(1536, 28, 8960, 12, 2, 151_936, True),
    "7b": Shape(3584, 28, 18_944, 28, 4, 152_064, False),
    "70b": Shape(8192, 80, 28_672, 64, 8, 128_256, False, "llama"),
}


def config(shape: Shape, context: int = 32_768) -> dict[str, Any]:
    return {
        "architectures": [ARCHITECTURES[shape.family]],
        "model_type": shape.family,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": context,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    }


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as the family's class has them, in layer order."""
    h, kv = shape.hidden, shape.hidden // shape.heads * shape.kv_heads
    yield "model.embed_tokens.weight", (shape.vocab, h)
    for i in range(shape.layers):
        p = f"model.layers.{i}."
        yield p + "input_layernorm.weight", (h,)
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            yield p + f"self_attn.{name}_proj.weight", (rows, h)
            if shape.family == "qwen2":
                yield p + f"self_attn.{name}_proj.bias", (rows,)
        yield p + "self_attn.o_proj.weight", (h, h)
        yield p + "post_attention_layernorm.weight", (h,)
        yield p + "mlp.gate_proj.weight", (shape.intermediate, h)
        yield p + "mlp.up_proj.weight", (shape.intermediate, h)
        yield p + "mlp.down_proj.weight", (h, shape.intermediate)
    yield "model.norm.weight", (h,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, h)


def n_bytes(dims: tuple[int, ...]) -> int:
    total = 2
    for dim in dims:
        total *= dim
    return total


def shards(shape: Shape) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Tensors packed in order into shards of at most SHARD_BYTES (or one tensor)."""
    packed: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    used = 0
    for name, dims in tensors(shape):
        if packed[-1] and used + n_bytes(dims) > SHARD_BYTES:
            packed.append([])
            used = 0
        packed[-1].append((name, dims))
        used += n_bytes(dims)
    return packed


def write_shard(
    path: Path, content: list[tuple[str, tuple[int, ...]]], seed: int, fill: bool, device: str
) -> None:
    """One safetensors file; with fill False the data is a hole, so headers of any size cost no disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dims in content:
        header[name] = {
            "dtype": "BF16",
            "shape": list(dims),
            "data_offsets": [offset, offset + n_bytes(dims)],
        }
        offset += n_bytes(dims)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if not fill:
            file.truncate(8 + len(text) + offset)
            return
        for number, (name, dims) in enumerate(content):
            file.write(random_bytes(name, dims, seed * 100_003 + number, device))


def random_bytes(name: str, dims: tuple[int, ...], seed: int, device: str) -> memoryview:
    import torch

    generator = torch.Generator(device).manual_seed(seed)
    if name.endswith("norm.weight"):
        tensor = torch.ones(dims, dtype=torch.bfloat16)
    elif name.endswith(".bias"):
        tensor = torch.zeros(dims, dtype=torch.bfloat16)
    else:
        tensor = torch.empty(dims, dtype=torch.bfloat16, device=device)
        tensor.normal_(0, 0.02, generator=generator)
    return tensor.cpu().flatten().view(torch.uint8).numpy().data


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Bytes first, then made-up words for every other id; ChatML turns, as the Qwen models have them."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = sorted(pre_tokenizers.ByteLevel.alphabet())
    words += [f"Ġw{i}" for i in range(vocab_size - len(words) - len(specials))]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in specials])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    end = [vocab_size - 1, vocab_size - 3]  # <|im_end|>, <|endoftext|>
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "do_sample": False}))


def make(name: str, folder: Path, seed: int = 0, headers_only: bool = False, device: str = "cpu") -> Path:
    """Write the model into `folder` and return it. `device` draws the numbers, each kind its own."""
    shape = SHAPES[name]
    folder.mkdir(parents=True, exist_ok=True)
    packed = shards(shape)
    index: dict[str, str] = {}
    for number, content in enumerate(packed):
        file = f"model-{number + 1:05d}-of-{len(packed):05d}.safetensors"
        write_shard(folder / file, content, seed + number, fill=not headers_only, device=device)
        index |= {tensor: file for tensor, _ in content}
    total = sum(n_bytes(dims) for content in packed for _, dims in content)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    )
    (folder / "config.json").write_text(json.dumps(config(shape), indent=1))
    write_tokenizer(folder, shape.vocab)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--headers-only", action="store_true", help="sparse files: right headers, no data")
    parser.add_argument("--device", default="cpu", help="draws the numbers; a GPU does so much faster")
    args = parser.parse_args()
    print(make(args.shape, args.out, args.seed, args.headers_only, args.device))


if __name__ == "__main__":
    main()
