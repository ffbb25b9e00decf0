"""Fused layers against the same layers before, with torch in the kernels' place: this is about the wiring."""

import gc
import logging
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loader.kv_layout import KvGroup, KvLayout
from service.engine.attention import layer_of
from service.engine.backends import TorchAttention
from service.engine.cuda.decoder import FusedStack
from service.engine.cuda.fusing import Fused, fuse
from service.engine.cuda.library import FEW_ROWS, CannotCompile, LaunchFailed
from service.engine.rows import Row
from service.engine.runner import Runner

BLOCK, CPU = 16, torch.device("cpu")
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 40},
    "qwen2": {"hidden_size": 128},
    "qwen3": {},
}
OTHERS = {"gemma": {}, "phi3": {"hidden_size": 128}, "llama": {"hidden_act": "gelu"}}


class TorchKernels:
    """What fused.cu computes, in torch's own operations."""

    def __init__(self, device=None, dtype=None):
        self.closed = False

    def here(self):
        return nullcontext()

    def close(self):
        self.closed = True

    def add_rms_norm(self, hidden, delta, weight, eps):
        if delta is not None:
            hidden.add_(delta)
        return _normed(hidden, weight, eps)

    def rotate_and_store(self, q, k, v, tables, norms, eps, slots, pools):
        cos, sin = (x[:, None] for x in tables)
        q_norm, k_norm = norms
        for x, norm in ((q, q_norm), (k, k_norm)):
            x = x.copy_(_normed(x, norm, eps)) if norm is not None else x
            low, high = x.chunk(2, -1)
            x.copy_(x * cos + torch.cat((-high, low), -1) * sin)
        for pool, x in zip(pools, (k, v), strict=True):
            pool.view(-1, *pool.shape[2:]).index_copy_(0, slots, x)

    def silu_times(self, gate, up):
        return gate.copy_(nn.functional.silu(gate) * up)

    def times_matrices(self, x, linears):
        assert len(x) in FEW_ROWS
        return [linear(x) for linear in linears]

    def times_gated(self, x, gate, up):
        assert len(x) in FEW_ROWS
        return nn.functional.silu(gate(x)) * up(x)


def _normed(x, weight, eps):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def model(family, **more):
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SIZES, **more})
    config.initializer_range = 0.15
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return made.requires_grad_(False)


def runner_of(made, window=None):
    layout = KvLayout(BLOCK, (KvGroup(window, tuple(range(4)), 32),))
    runner = Runner(made, "cpu", context=256, concurrency=4, chunk_tokens=128, layout=layout)
    runner._repeats = None  # as on a GPU: all layers compute when logits are compared
    layers = _layers(made)
    assert len(layers) == 4
    assert all(isinstance(layer.backend, TorchAttention) for layer in layers)
    return runner


def _layers(made):
    return [layer for module in made.modules() if (layer := layer_of(module)) is not None]


def logits(runner):
    """Of a prompt beside a shorter one, of two steps after them, and of one for the first alone."""
    ids = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 320, (n,), generator=ids).tolist() for n in (70, 9)]
    tables = [([0, 1, 2, 3, 4],), ([5, 6],)]
    found = [runner.step([Row(p, 0, t, True) for p, t in zip(prompts, tables, strict=True)]).clone()]
    for at in range(2):
        rows = [Row([at + 5], len(p) + at, t, True) for p, t in zip(prompts, tables, strict=True)]
        found.append(runner.step(rows).clone())
    found.append(runner.step([Row([9], len(prompts[0]) + 2, tables[0], True)]).clone())
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_layers_give_the_same_logits_to_the_bit(family):
    made = model(family, **FAMILIES[family])
    runner = runner_of(made, FAMILIES[family].get("sliding_window"))
    before = logits(runner)
    fused, kernels = Fused(made, CPU), TorchKernels()
    fused.apply(kernels)
    assert [type(x) for x in made.model.layers] == [FusedStack]
    assert torch.equal(logits(runner), before)
    fused.close()
    assert len(made.model.layers) == 4
    assert kernels.closed
    assert torch.equal(logits(runner), before)


@pytest.mark.parametrize("family", OTHERS)
def test_what_the_kernels_do_not_compute_stays_as_it_is(family):
    made = model(family, **OTHERS[family])
    runner_of(made)
    assert not Fused(made, CPU)


def test_float32_and_hooked_layers_stay_as_they_are():
    made = model("llama")
    runner_of(made)
    assert Fused(made, CPU)
    assert not Fused(made, torch.device("meta")), "not where inputs go"
    made.model.layers[1].mlp._hf_hook = object()
    assert not Fused(made, CPU)
    wide = model("llama").float()
    runner_of(wide)
    assert not Fused(wide, CPU)
    mixed = model("llama")
    mixed.model.layers[2].half()
    runner_of(model("llama"))
    assert not Fused(mixed, CPU)


@pytest.fixture
def a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def test_a_model_is_fused_when_its_logits_stay_alike(a_gpu):
    made = model("qwen3")
    runner = runner_of(made)
    runner.fused = fuse(made, runner, CPU, TorchKernels)
    assert isinstance(made.model.layers[0], FusedStack)
    pools = [weakref.ref(store.keys) for store in runner._stores.values()]
    runner.close()
    assert len(made.model.layers) == 4
    gc.collect()
    assert not any(pool() is not None for pool in pools), "blocks are not given back"


class WrongGate(TorchKernels):
    def silu_times(self, gate, up):
        return gate


class WrongRows(TorchKernels):
    """Only where steps have one or two tokens."""

    def times_matrices(self, x, linears):
        return [torch.zeros_like(out) for out in super().times_matrices(x, linears)]


class WrongRow(TorchKernels):
    def times_gated(self, x, gate, up):
        return super().times_gated(x, gate, up) * (len(x) - 1)


class Unlaunched(TorchKernels):
    def add_rms_norm(self, hidden, delta, weight, eps):
        raise LaunchFailed("add_rms_norm", 400)


@pytest.mark.parametrize("wrong", [WrongGate, WrongRows, WrongRow, Unlaunched])
def test_kernels_that_compute_something_else_are_left_out_and_the_log_says_so(a_gpu, caplog, wrong):
    made = model("llama")
    runner = runner_of(made)
    before = logits(runner)
    with caplog.at_level(logging.ERROR):
        assert fuse(made, runner, CPU, wrong) is None
    assert torch.equal(logits(runner), before)
    assert "torch computes alone" in caplog.text


def test_running_out_of_memory_is_nobodys_fault_and_leaves_the_model_as_it_was(a_gpu):
    class Full(TorchKernels):
        def silu_times(self, gate, up):
            raise MemoryError

    made = model("llama")
    with pytest.raises(MemoryError):
        fuse(made, runner_of(made), CPU, Full)
    assert len(made.model.layers) == 4


def test_without_a_compiler_torch_computes_alone(a_gpu, caplog):
    def refuse(device, dtype):
        raise CannotCompile("libnvrtc.so.13: cannot open shared object file")

    made = model("llama")
    runner = runner_of(made)
    assert fuse(made, runner, CPU, refuse) is None
    assert not isinstance(made.model.layers[0], FusedStack)
    assert "libnvrtc.so.13" in caplog.text


def test_an_older_gpu_keeps_torchs_own_and_the_log_says_why(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    made = model("llama")
    with caplog.at_level(logging.INFO):
        assert fuse(made, runner_of(made), CPU, TorchKernels) is None
    assert not isinstance(made.model.layers[0], FusedStack)
    assert "compute capability 7.5" in caplog.text
