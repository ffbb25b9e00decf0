"""Holds the bytes that a step of a batch may take against a trace of the runner itself, over the attention in
plain torch, which is the one that holds the most."""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from loader.checkpoint import ModelSpec
from loader.families import FAMILIES
from loader.footprint import measure
from loader.packed import PackedForward
from loader.placement import Setting
from loader.pool import rule_for
from service.engine import runner as engine
from service.engine.backends import TorchAttention
from service.engine.cpu.attention import NativeAttention
from service.engine.cpu.packing import pack
from service.engine.rows import Row

VOCAB, CONTEXT, ROWS = 500, 1024, 4
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}
MODELS = {
    "llama": {},
    "granite": {},
    "mistral": {"sliding_window": 300},
    "qwen2": {"use_sliding_window": True, "sliding_window": 300, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "smollm3": {},
    "starcoder2": {"sliding_window": 4096},
    "gemma": {"num_key_value_heads": 1, "head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 300},
    "gemma3_text": {"head_dim": 32, "sliding_window": 300, "num_hidden_layers": 6},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "phi3": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
}


class LiveBytes(TorchDispatchMode):
    """The highest sum of storages made inside and still referenced."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {
            x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage):
        if storage._cdata not in self.live:
            self.live[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, storage._cdata)

    def _drop(self, key):
        self.now -= self.live.pop(key, 0)


def model_of(family, dtype, **others):
    config = AutoConfig.for_model(family, **{**SIZES, **MODELS.get(family, {}), **others})
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def footprint_of(model, dtype):
    spec = ModelSpec("test", None, model.config.to_dict(), ())
    return measure(spec, str(dtype).removeprefix("torch."))


@contextmanager
def runner_of(model, footprint, chunk, monkeypatch, backend=TorchAttention):
    """Not in inference mode, which hides what composite operations allocate inside."""
    layout = rule_for(footprint.layers, True, "cpu").layout(Setting(chunk, CONTEXT, ROWS))
    monkeypatch.setattr(engine, "backend_for", lambda *_: backend)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    runner = engine.Runner(model, "cpu", CONTEXT, ROWS, chunk, layout)
    yield runner
    runner.close()


def row(runner, count, end=CONTEXT):
    """The last `count` of `end` tokens."""
    layout = runner.layout
    blocks = -(-end // layout.block_tokens)
    tables = tuple([block % group.blocks for block in range(blocks)] for group in layout.groups)
    return Row([1] * count, end - count, tables, True)


def traced(runner, rows):
    step = runner._batcher.build(rows)
    with torch.no_grad(), LiveBytes() as trace:
        runner._forward(step)
    return trace.peak


# What is in a step: a whole chunk of one, chunks of several, single tokens with one chunk, single tokens.
STEPS = [(512,), (256, 256), (1, 1, 1, 509), (100, 200, 100, 112), (1, 1, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODELS)
def test_no_step_of_a_batch_holds_more_than_is_counted_and_the_worst_not_much_less(
    family, dtype, monkeypatch
):
    model = model_of(family, dtype)
    footprint = footprint_of(model, dtype)
    with runner_of(model, footprint, 512, monkeypatch) as runner:
        peaks = [traced(runner, [row(runner, count) for count in counts]) for counts in STEPS]
    logits = ROWS * (VOCAB + 128) * dtype.itemsize
    counted = footprint.packed_activation_bytes(512, CONTEXT, ROWS, 32)
    assert max(peaks) <= counted + logits
    kept = PackedForward(footprint.shape, dtype.itemsize, 512, CONTEXT, rows=ROWS).scratch  # by CPU kernels
    assert counted <= 1.5 * max(peaks) + kept, "a step is counted with far more than it takes"


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("backend", [TorchAttention, NativeAttention])
@pytest.mark.parametrize("isa", ["scalar"], indirect=True)
def test_nor_does_one_with_the_cpu_kernels_and_what_they_keep(family, backend, isa, kernels, monkeypatch):
    """At worst without bf16 products: then they keep their input in float32."""
    model = model_of(family, torch.bfloat16)
    footprint = footprint_of(model, torch.bfloat16)
    counted = footprint.packed_activation_bytes(512, CONTEXT, ROWS, 32) + ROWS * (VOCAB + 128) * 2
    with runner_of(model, footprint, 512, monkeypatch, backend) as runner:
        pack(model, kernels)
        peaks = [traced(runner, [row(runner, count) for count in counts]) for counts in STEPS]
    assert max(peaks) <= counted


@pytest.mark.parametrize("chunk", [64, 1024])
def test_small_and_whole_chunks_are_counted_too(chunk, monkeypatch):
    for family in ("qwen2", "gemma2"):
        model = model_of(family, torch.float32)
        footprint = footprint_of(model, torch.float32)
        with monkeypatch.context() as patch, runner_of(model, footprint, chunk, patch) as runner:
            peak = traced(runner, [row(runner, chunk)])
        assert peak <= footprint.packed_activation_bytes(chunk, CONTEXT, ROWS, 32) + (VOCAB + 128) * 4


def test_every_family_of_the_table_that_is_batched_is_traced():
    assert set(MODELS) == set(FAMILIES) - {"lfm2"}


def test_what_graphs_keep_grows_with_rows_and_not_with_context_as_attention_reads_blocks_in_place():
    footprint = footprint_of(model_of("llama", torch.bfloat16), torch.bfloat16)
    few, many = (footprint.graph_bytes(rows, 1024, 256) for rows in (1, 64))
    assert 32 * few < many
    longer = footprint.graph_bytes(64, 8192, 256)
    assert longer - many == 64 * (8192 - 1024) // 256 * 4  # block tables alone
