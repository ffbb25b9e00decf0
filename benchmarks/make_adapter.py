"""Writes a LoRA adapter with random weights for a model: python -m benchmarks.make_adapter MODEL OUT.

On every linear layer of the decoder, in peft's format. Unlike a fresh adapter of peft's, B is not zero, so
that merging it changes most elements.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path

from loader import checkpoint

_LINEAR = re.compile(r"(.*layers\.\d+\..*\.(\w+_proj))\.(weight|qweight)")


def make(model: Path, folder: Path, rank: int = 16, seed: int = 0) -> Path:
    """Write the adapter for the linear layers of `model` (plain, or GPTQ of any width); gives `folder`."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors, targets = {}, set()
    infos = checkpoint.read_any(model).tensors
    shapes = {info.name: info.shape for info in infos}
    for info in infos:
        if not (match := _LINEAR.fullmatch(info.name)):
            continue
        targets.add(match[2])
        rows, columns = info.shape if match[3] == "weight" else _unpacked(shapes, match[1])
        for name, shape in (("lora_A", (rank, columns)), ("lora_B", (rows, rank))):
            values = torch.empty(shape).normal_(0, 0.02, generator=generator)
            tensors[f"base_model.model.{match[1]}.{name}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(
        json.dumps(config(model.name, rank, sorted(targets)), indent=1)
    )
    return folder


def _unpacked(shapes: Mapping[str, tuple[int, ...]], layer: str) -> tuple[int, int]:
    """(outputs, inputs) of a GPTQ layer: qzeros packs the outputs as tightly as qweight packs the inputs."""
    packed, outputs = shapes[f"{layer}.qweight"]
    return outputs, packed * outputs // shapes[f"{layer}.qzeros"][1]


def config(base: str, rank: int, targets: list[str]) -> dict[str, object]:
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank,
        "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": targets, "bias": "none",
        "fan_in_fan_out": False, "inference_mode": True,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(make(args.model, args.out, args.rank, args.seed))


if __name__ == "__main__":
    main()
