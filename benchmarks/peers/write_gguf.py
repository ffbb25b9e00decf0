"""Run by the interpreter of llama.cpp's environment: write_gguf.py MODEL OUT.

Writes the bf16 safetensors of a Qwen2 model and the tokenizer of make_model as one GGUF file, matrices bit by
bit, norms and biases in float32 as llama.cpp wants them.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
REST = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensors(model: Path) -> Iterator[tuple[str, Any]]:
    """Name and bf16 values as uint16, of every file; mapped, not read."""
    for file in sorted(model.glob("*.safetensors")):
        data = np.memmap(file, dtype=np.uint8, mode="r")
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        header = json.loads(data[8 : 8 + length].tobytes())
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise SystemExit(f"{name} is {entry['dtype']}, not BF16")
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def name_in_gguf(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in REST:
        return f"{REST[module]}.{kind}"
    number, _, inner = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{LAYER[inner]}.{kind}"


def add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)


def add_tokenizer(writer: gguf.GGUFWriter, model: Path) -> None:
    described = json.loads((model / "tokenizer.json").read_text())
    special = {token["id"]: token["content"] for token in described["added_tokens"]}
    ids = {number: text for text, number in described["model"]["vocab"].items()} | special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([ids[number] for number in range(len(ids))])
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer.add_token_types([kinds[number in special] for number in range(len(ids))])
    # Merges must be there and not be empty. This one never applies: every byte is a token of its own.
    writer.add_token_merges(["Ġw0 Ġw1"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((model / "chat_template.jinja").read_text())


def main() -> None:
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] != "qwen2":
        raise SystemExit(f"only qwen2 is written here, this is {config['model_type']}")
    unfinished = out.with_suffix(".part")
    writer = gguf.GGUFWriter(unfinished, "qwen2")
    add_shape(writer, config)
    add_tokenizer(writer, model)
    for name, values in tensors(model):
        if values.ndim == 1:
            wide = (values.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(name_in_gguf(name), wide)
        else:
            raw = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name_in_gguf(name), values.view(np.uint8), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.rename(out)


if __name__ == "__main__":
    main()
