"""Holds the arithmetic of one forward's memory against a trace of transformers' own modeling code.

The trace runs in FakeTensorMode, so full-size layers cost no memory: every storage that an operation makes is
counted until Python lets go of it.
"""

import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from loader.activations import Forward
from loader.checkpoint import ModelSpec
from loader.families import FAMILIES
from loader.shape import describe

SMALL = {"vocab_size": 1000, "num_hidden_layers": 2, "pad_token_id": 0}
# Layers of real models, two to eight of them: how many does not change the peak.
MODELS = {
    "qwen2 7B": ("qwen2", 3584, 18_944, 28, 4, {}),
    "qwen2 0.5B": ("qwen2", 896, 4864, 14, 2, {}),
    "qwen2 with a window above layer 2": (
        "qwen2", 3584, 18_944, 28, 4,
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 2, "num_hidden_layers": 4},
    ),
    "qwen3 8B": ("qwen3", 4096, 12_288, 32, 8, {"head_dim": 128}),
    "qwen3 0.6B": ("qwen3", 1024, 3072, 16, 8, {"head_dim": 128}),
    "llama 3.1 8B": ("llama", 4096, 14_336, 32, 8, {}),
    "granite 8B": ("granite", 4096, 12_800, 32, 8, {}),
    "smollm3 3B": ("smollm3", 2048, 11_008, 16, 4, {}),
    "starcoder2 3B": ("starcoder2", 3072, 12_288, 24, 2, {"sliding_window": 4096}),
    "mistral 7B with its window": ("mistral", 4096, 14_336, 32, 8, {"sliding_window": 1024}),
    "gemma 2B": ("gemma", 2048, 16_384, 8, 1, {"head_dim": 256}),
    "gemma2 9B": ("gemma2", 3584, 14_336, 16, 8, {"head_dim": 256, "sliding_window": 1024}),
    "gemma3 4B": (
        "gemma3_text", 2560, 10_240, 8, 4,
        {"head_dim": 256, "sliding_window": 512, "num_hidden_layers": 8},
    ),
    "phi-2": ("phi", 2560, 10_240, 32, 32, {"partial_rotary_factor": 0.4}),
    "phi3 mini": ("phi3", 3072, 8192, 32, 32, {}),
    "phi-4": ("phi3", 5120, 17_920, 40, 10, {}),
    "qwen3_moe 30B": (
        "qwen3_moe", 2048, 6144, 32, 4,
        {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
    "mixtral 8x7B": ("mixtral", 4096, 14_336, 32, 8, {}),
    "mixtral of small experts": ("mixtral", 2048, 1024, 16, 8, {}),
    "lfm2 1.2B": (
        "lfm2", 2048, 12_288, 32, 8,
        {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    ),
    "lfm2 of small MLPs": (
        "lfm2", 2048, 2048, 32, 8,
        {"layer_types": ["conv", "full_attention"] * 2, "num_hidden_layers": 4},
    ),
}  # fmt: skip
UNLISTED = {
    "olmo2": ("olmo2", 4096, 11_008, 32, 32, {}),
    "glm4": ("glm4", 4096, 13_696, 32, 2, {}),
    "qwen2_moe": ("qwen2_moe", 2048, 5632, 16, 16, {}),
    "qwen3_next": ("qwen3_next", 2048, 5120, 16, 2, {"num_hidden_layers": 4, "num_experts": 64}),
}
# (tokens in the chunk, tokens before it)
CHUNKS = [(2048, 0), (256, 0), (64, 1984), (512, 3584), (256, 16_128)]


class LiveBytes(TorchDispatchMode):
    """The highest sum of storages made inside and still referenced; `kept` ones are not counted."""

    def __init__(self, kept):
        super().__init__()
        self.kept = {storage._cdata for storage in kept}
        self.live = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _count(self, storage):
        key = storage._cdata
        if key not in self.kept and key not in self.live:
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key):
        self.now -= self.live.pop(key, 0)


class PreallocatedLayer(CacheLayerMixin):
    """Keys and values in buffers made beforehand, as the engine's cache has them; no concatenation."""

    def __init__(self, past, chunk, window, kv_heads, head_dim, dtype):
        super().__init__()
        self.is_sliding = window is not None
        self.kept = past if window is None else min(past, window - 1)
        self.offset = past - self.kept
        self.past, self.chunk = past, chunk
        shape = (1, kv_heads, self.kept + chunk + 8, head_dim)
        self.keys, self.values = torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)
        self.is_initialized = True

    def lazy_initialization(self, key_states, value_states):
        raise AssertionError("the buffers are there")

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.kept + self.chunk
        self.keys[:, :, self.kept : end].copy_(key_states)
        self.values[:, :, self.kept : end].copy_(value_states)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length):
        return self.kept + self.chunk, self.offset

    def get_seq_length(self):
        return self.past

    def get_max_length(self):
        return -1


def config_of(model):
    family, hidden, intermediate, heads, kv_heads, others = model
    sizes = {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip
    return AutoConfig.for_model(family, **{**SMALL, **sizes, **others})


def cache_for(config, dtype, chunk, past):
    """The model's own layers, but attention into buffers; and the storages of those."""
    cache = DynamicCache(config=config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    storages = []
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer):
            window = getattr(layer, "sliding_window", None)
            kv_heads = config.num_key_value_heads
            cache.layers[i] = ours = PreallocatedLayer(past, chunk, window, kv_heads, head_dim, dtype)
            storages += [ours.keys.untyped_storage(), ours.values.untyped_storage()]
    return Cache(layers=cache.layers), storages


def state_bytes(cache):
    states = [
        state
        for layer in cache.layers
        for kind in ("conv_states", "recurrent_states")
        for state in getattr(layer, kind, {}).values()
        if state is not None
    ]
    return sum(state.untyped_storage().nbytes() for state in states)


def traced_peak(config, dtype, chunk, past):
    """Bytes at the worst moment of one forward, without weights, buffers and what the cache keeps.

    no_grad rather than inference_mode: inference mode hides what composite operations allocate inside.
    """
    attention = "eager" if config.model_type == "gemma2" else "sdpa"
    with FakeTensorMode(), torch.no_grad():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
        kept = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        cache, storages = cache_for(config, dtype, chunk, past)
        ids = torch.zeros(1, chunk, dtype=torch.long)
        positions = torch.arange(past, past + chunk).unsqueeze(0)
        with LiveBytes([*kept, *storages]) as trace:
            model(ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return trace.peak - state_bytes(cache)


def computed_peak(config, dtype, chunk, past):
    shape = describe(ModelSpec("test", None, config.to_dict(), ()))
    return Forward(shape, dtype.itemsize, chunk, past + chunk).peak_bytes()


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_activations_are_within_five_percent_of_a_trace(model):
    config = config_of(model)
    for chunk, past in CHUNKS:
        traced = traced_peak(config, torch.bfloat16, chunk, past)
        assert computed_peak(config, torch.bfloat16, chunk, past) == pytest.approx(traced, rel=0.05), (
            chunk,
            past,
        )


@pytest.mark.parametrize("name", ["qwen2 0.5B", "qwen3 0.6B", "gemma2 9B", "phi-2", "lfm2 1.2B"])
def test_activations_of_a_float32_model_are_within_five_percent_of_a_trace(name):
    config = config_of(MODELS[name])
    for chunk, past in [(512, 0), (256, 3840)]:
        traced = traced_peak(config, torch.float32, chunk, past)
        assert computed_peak(config, torch.float32, chunk, past) == pytest.approx(traced, rel=0.05), (
            chunk,
            past,
        )


@pytest.mark.parametrize("model", UNLISTED.values(), ids=UNLISTED)
def test_the_estimate_for_an_unlisted_family_is_no_smaller_than_a_trace(model):
    config = config_of(model)
    for chunk, past in CHUNKS[:4]:
        assert computed_peak(config, torch.bfloat16, chunk, past) >= traced_peak(
            config, torch.bfloat16, chunk, past
        )


def test_every_family_of_the_table_is_traced():
    assert {model[0] for model in MODELS.values()} == set(FAMILIES)


def test_qwen2_7b_reads_2048_tokens_in_279_mib():
    assert computed_peak(config_of(MODELS["qwen2 7B"]), torch.bfloat16, 2048, 0) / 2**20 == pytest.approx(
        279, abs=0.1
    )


def test_a_gpu_also_copies_a_mask_whose_rows_are_not_aligned():
    shape = describe(ModelSpec("test", None, config_of(MODELS["qwen2 0.5B"]).to_dict(), ()))
    on_cpu, on_gpu = (Forward(shape, 2, 2048, 16_384, gpu).peak_bytes() for gpu in (False, True))
    assert on_gpu - on_cpu == 2048 * (16_384 + 8) * 2
