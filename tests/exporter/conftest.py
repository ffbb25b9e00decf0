"""Tiny models as transformers saves them, adapters on them as peft saves them, and peft's own merge."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

VOCAB, HIDDEN = 96, 64

_SMALL = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_MODELS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "tiny_qwen2": ("qwen2", _SMALL),
    "tiny_tied": ("qwen2", _SMALL | {"tie_word_embeddings": True}),
    "tiny_llama": ("llama", _SMALL),
    "tiny_gpt2": (
        "gpt2", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4},
    ),
    "tiny_qwen3_moe": ("qwen3_moe", _SMALL | _EXPERTS),
    "tiny_mixtral": ("mixtral", _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "tiny_gpt_oss": (
        "gpt_oss",
        _SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": HIDDEN},
    ),
}  # fmt: skip

Saved = Callable[..., Path]
# (base, adapter folders, …) -> every tensor of the merged model, under the names of its checkpoint
Merged = Callable[..., "dict[str, Any]"]


def _model(name: str, folder: Path) -> Path:
    """A folder as save_pretrained writes it: in bf16, or fp32; weights, biases and norms are random."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    family, values = _MODELS[name.replace("fp32", "tiny")]
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model.named_parameters(), seed=5)
    model.to(torch.float32 if name.startswith("fp32") else torch.bfloat16).save_pretrained(folder)
    return folder


def _randomize(parameters: Any, seed: int) -> None:
    import torch

    random = torch.Generator().manual_seed(seed)
    for _, parameter in parameters:
        # In place: what shares memory goes on sharing it.
        parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=random))


def _fixture(name: str) -> Any:
    @pytest.fixture(scope="session", name=name)
    def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
        return _model(name, tmp_path_factory.mktemp(name))

    return made


tiny_qwen2 = _fixture("tiny_qwen2")
tiny_tied = _fixture("tiny_tied")
tiny_llama = _fixture("tiny_llama")
tiny_gpt2 = _fixture("tiny_gpt2")
tiny_qwen3_moe = _fixture("tiny_qwen3_moe")
tiny_mixtral = _fixture("tiny_mixtral")
tiny_gpt_oss = _fixture("tiny_gpt_oss")
fp32_qwen2 = _fixture("fp32_qwen2")
fp32_tied = _fixture("fp32_tied")
fp32_gpt2 = _fixture("fp32_gpt2")


@pytest.fixture(scope="session")
def tiny_model(request: pytest.FixtureRequest) -> Callable[[str], Path]:
    """`tiny_model("tiny_gpt2")`: one of the folders above by its name, for parametrized tests."""
    return lambda name: request.getfixturevalue(name)


@pytest.fixture(scope="session")
def trained_adapters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Adapters that were made once, by all that they depend on: peft takes its time."""
    made: dict[str, Path] = {}

    def find(seed: int, base: Path, resize: int | None, lora: Mapping[str, Any]) -> Path:
        key = f"{seed} {base} {resize} {sorted(lora.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("adapter")
            train(seed, base, resize, lora).save_pretrained(made[key])
        return made[key]

    return find


def train(seed: int, base: Path, resize: int | None, lora: Mapping[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**({"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | dict(lora)))
    model = get_peft_model(load(base, resize), config)
    _randomize(trained(model), seed)
    return model


@pytest.fixture
def make_adapter(tmp_path: Path, trained_adapters: Callable[..., Path]) -> Saved:
    """`make_adapter(base, r=4, target_modules=[…])`: a folder as peft's save_pretrained writes it.

    Everything that can be trained is random and not zero. `resize` is a vocabulary's new size; `change` is
    called with the PeftModel before it is saved. All else goes to LoraConfig.
    """
    made: list[Path] = []

    def make(
        base: Path, resize: int | None = None, change: Callable[[Any], None] | None = None, **lora: Any
    ) -> Path:
        seed, folder = len(made) + 11, tmp_path / f"adapter{len(made)}"
        made.append(folder)
        if change is None:
            return shutil.copytree(trained_adapters(seed, base, resize, lora), folder)
        model = train(seed, base, resize, lora)
        change(model)
        model.save_pretrained(folder)
        return folder

    return make


@cache
def _loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype="auto")


@pytest.fixture(name="load")
def load_fixture() -> Callable[..., Any]:
    return load


def load(base: Path, resize: int | None = None) -> Any:
    """The model in its own dtype, its vocabulary resized as the trainer of an adapter would."""
    import torch

    model = copy.deepcopy(_loaded(base))
    if resize is not None:
        torch.manual_seed(3)
        model.resize_token_embeddings(resize)
    return model


def trained(model: Any) -> list[tuple[str, Any]]:
    """The parameters that training would have changed; DoRA's magnitudes stay near what they began with."""
    found = []
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.25
        elif parameter.requires_grad:
            found.append((name, parameter))
    return found


@pytest.fixture
def merged_by_peft(tmp_path: Path) -> Merged:
    """`merged_by_peft(base, adapter, …)`: the tensors that merge_and_unload and save_pretrained write."""

    def merge(base: Path, *adapters: Path, resize: int | None = None) -> dict[str, Any]:
        from peft import PeftModel
        from safetensors.torch import load_file

        model = load(base, resize)
        for adapter in adapters:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model.save_pretrained(tmp_path / "merged")
        return load_file(tmp_path / "merged" / "model.safetensors")

    return merge


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """`edit_config(adapter, r=8)`: change keys of its adapter_config.json."""

    def edit(folder: Path, **changes: Any) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


# The exporter's own way, without its files


@pytest.fixture
def planned() -> Callable[..., Any]:
    """`planned(base, adapter, (adapter, 0.5))`: what ties.resolve makes of targets.match."""
    return plan


@pytest.fixture
def exported() -> Merged:
    """`exported(base, adapter, …)`: merged tensors by name, `block` rows at a time, rounded to `dtype`."""
    return export


def plan(base: Path, *references: Any) -> Any:
    from exporter.adapters import adapter as adapters
    from exporter.adapters import targets, ties
    from exporter.weights import Plain, Stored
    from loader import checkpoint

    spec = checkpoint.read_any(base)
    weights = [Plain(info.name, Stored(info, base)) for info in spec.tensors]
    pairs = [reference if isinstance(reference, tuple) else (reference, 1.0) for reference in references]
    read = [adapters.read(str(folder), weight) for folder, weight in pairs]
    return ties.resolve(targets.match(weights, read, spec.config), spec.config, read)


def export(base: Path, *references: Any, block: int = 10**9, dtype: Any = None) -> dict[str, Any]:
    import torch

    from exporter.weights import Inputs

    with Inputs() as inputs:
        return {
            recipe.name: _made(recipe, inputs, block, dtype or torch.bfloat16)
            for recipe in plan(base, *references).recipes
        }


def _made(recipe: Any, inputs: Any, block: int, dtype: Any) -> Any:
    import torch

    from exporter.merge import open_updates
    from exporter.weights import matrix

    rows, columns = matrix(recipe.shape)
    out = torch.empty(rows, columns, dtype=dtype)
    changes = open_updates(recipe, inputs)
    read = recipe.base.open(inputs)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        values = read(recipe.first_row + start, recipe.first_row + stop).to(torch.float32, copy=True)
        for change in changes:
            values = change(start, values)
        out[start:stop] = values
    return out.view(recipe.shape)
