"""The GPU kernels against what torch and transformers compute."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loader.kv_layout import KvGroup, KvLayout
from service.engine.cuda.decoder import FusedStack
from service.engine.cuda.fusing import fuse
from service.engine.cuda.library import CudaKernels
from service.engine.rows import Row
from service.engine.runner import Runner

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: what runs on a GPU is NOT tested"
)
GPU, BLOCK = torch.device("cuda:0"), 256
SIZES = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 520, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8},
    "mistral": {"sliding_window": 300},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
}


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture
def kernels(dtype):
    return CudaKernels(GPU, dtype)


def random(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device=GPU) * scale).to(dtype)


def normed(x, weight, eps=1e-6):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def off_by_a_rounding(found, wanted, dtype):
    """No more than one step of the dtype apart; the sums may be taken in another order."""
    torch.testing.assert_close(found, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 37])
@pytest.mark.parametrize("width", [64, 896, 3584, 8192, 16_384])
def test_the_norm_is_that_of_llama(kernels, dtype, rows, width):
    hidden, delta = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
    weight = random(width, dtype=dtype)
    off_by_a_rounding(kernels.add_rms_norm(hidden, None, weight, 1e-6), normed(hidden, weight), dtype)
    added = hidden + delta
    off_by_a_rounding(kernels.add_rms_norm(hidden, delta, weight, 1e-6), normed(added, weight), dtype)
    assert torch.equal(hidden, added)


@pytest.mark.parametrize("with_norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 4, 128), (3, 1, 80)])
def test_queries_are_rotated_and_keys_and_values_stored(
    kernels, dtype, with_norms, heads, kv_heads, head_dim
):
    tokens = 19
    q, k, v = (random(tokens, n, head_dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    cos, sin = (random(tokens, head_dim, dtype=dtype) for _ in range(2))
    norms = [random(head_dim, dtype=dtype) for _ in range(2)] if with_norms else [None, None]
    pools = tuple(torch.full((4, 16, kv_heads, head_dim), 7.0, device=GPU, dtype=dtype) for _ in "kv")
    slots = torch.randperm(64, device=GPU)[:tokens]

    def rotated(x, norm):
        x = normed(x, norm) if norm is not None else x
        low, high = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-high, low), -1) * sin[:, None]

    wanted_q, wanted_k = rotated(q, norms[0]), rotated(k, norms[1])
    kernels.rotate_and_store(q, k, v, (cos, sin), tuple(norms), 1e-6, slots, pools)
    stored = [pool.view(64, kv_heads, head_dim) for pool in pools]
    if with_norms:  # a rounding in the norm may be several steps of a difference of two numbers
        torch.testing.assert_close(q, wanted_q, rtol=2e-2, atol=5e-2)
        torch.testing.assert_close(stored[0][slots], wanted_k, rtol=2e-2, atol=5e-2)
    else:
        assert torch.equal(q, wanted_q)
        assert torch.equal(stored[0][slots], wanted_k)
    assert torch.equal(stored[1][slots], v)
    others = torch.ones(64, dtype=torch.bool, device=GPU)
    others[slots] = False
    assert all((pool[others] == 7).all() for pool in stored)


def test_silu_times_is_torchs(kernels, dtype):
    gate, up = random(5, 18_944, dtype=dtype, scale=4), random(5, 18_944, dtype=dtype)
    wanted = nn.functional.silu(gate) * up
    off_by_a_rounding(kernels.silu_times(gate, up), wanted, dtype)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [64, 3584, 18_944])
def test_a_few_rows_times_matrices_are_the_products(kernels, dtype, bias, width, rows):
    x = random(rows, width, dtype=dtype)
    linears = [nn.Linear(width, n, bias, device=GPU, dtype=dtype) for n in (100, 3, 512)]
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 2e-3}
    for count in (1, 2, 3):
        for out, linear in zip(kernels.times_matrices(x, linears[:count]), linears, strict=False):
            wide = x.double() @ linear.weight.double().T
            wanted = wide + linear.bias.double() if bias else wide
            torch.testing.assert_close(out.double(), wanted, **tolerance)
    gate, up = (nn.Linear(width, 520, bias, device=GPU, dtype=dtype) for _ in range(2))
    wanted = nn.functional.silu(gate(x)) * up(x)
    torch.testing.assert_close(kernels.times_gated(x, gate, up), wanted, rtol=2e-2, atol=2e-3)


def model(family, dtype):
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    config.initializer_range = 0.1
    made = AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in made.named_parameters():
        if name.endswith("bias") or "norm" in name:
            parameter.data.normal_(1.0 if "norm" in name else 0.0, 0.1)
    return made.to(GPU)


def logits(made, family, gpu_kernels):
    """Of a prompt beside a shorter one, of both in two steps more, and of the first alone; and whether the
    steps were graphs."""
    layout = KvLayout(BLOCK, (KvGroup(FAMILIES[family].get("sliding_window"), tuple(range(4)), 16),))
    runner = Runner(made, "cuda:0", 1024, 4, 512, layout)
    if gpu_kernels:
        runner.fused = fuse(made, runner, GPU)
        assert isinstance(made.model.layers[0], FusedStack)
    runner.rehearse()
    ids = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 2048, (n,), generator=ids).tolist() for n in (400, 9)]
    tables = [([0, 1],), ([2],)]
    found = [runner.step([Row(p, 0, t, True) for p, t in zip(prompts, tables, strict=True)]).clone()]
    for at in range(2):
        rows = [Row([at + 5], len(p) + at, t, True) for p, t in zip(prompts, tables, strict=True)]
        found.append(runner.step(rows).clone())
    found.append(runner.step([Row([9], 402, tables[0], True)]).clone())
    recorded = runner._graphs is not None
    runner.close()
    return torch.cat(found).float(), recorded


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fused_model_computes_what_it_did(family, dtype):
    made = model(family, dtype)
    plain, _ = logits(made, family, gpu_kernels=False)
    fused, recorded = logits(made, family, gpu_kernels=True)
    assert recorded
    likeness = nn.functional.cosine_similarity(plain, fused, dim=-1)
    assert likeness.min() > 0.999
    torch.testing.assert_close(fused, plain, rtol=0.05, atol=0.05 * float(plain.std()))
