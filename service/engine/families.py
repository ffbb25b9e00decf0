"""By what a module of transformers is known, so that kernels of ours may compute in its place."""

from __future__ import annotations

from typing import Any

# Classes of decoder layers whose forward was what the fused kernels compute when this was written. Whether it
# still is, a check finds out before anything is served (service.engine.proof).
LLAMA_KINDS = frozenset(
    {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
GATED_MLP = ("gate_proj", "up_proj", "down_proj")
SILU = 0
# enum Activation of cpu/linear.h, by the classes that transformers' ACT2FN gives.
ACTIVATIONS = {"SiLU": SILU, "SiLUActivation": SILU, "GELUTanh": 1, "PytorchGELUTanh": 1, "GELUActivation": 2}


def is_hooked(module: Any) -> bool:
    """Whether something is done around a module's forward, by accelerate for one: then it stays."""
    return hasattr(module, "_hf_hook") or bool(module._forward_hooks or module._forward_pre_hooks)


def activation_of(mlp: Any) -> int | None:
    """Which of the kernels' activations an MLP has; None: another one."""
    return ACTIVATIONS.get(type(getattr(mlp, "act_fn", None)).__name__)
