"""Packed modules against torch's own, in double precision, on every instruction set of this machine."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from service.engine.cpu.modules import (
    Matrix,
    PackedEmbedding,
    PackedLinear,
    PackedMlp,
    PackedRmsNorm,
    packable,
)
from service.engine.cpu.scratch import Scratch

# Every group of rows that kernels take at once, and several.
ROWS = (1, 2, 3, 4, 5, 6, 10, 11, 15, 16, 17, 31, 33, 64, 150)
SHAPES = ((32, 32), (16, 64), (48, 96), (128, 896), (896, 128), (1040, 64))


def linear(n, k, bias=True, seed=0):
    torch.manual_seed(seed)
    made = nn.Linear(k, n, bias=bias, dtype=torch.bfloat16)
    made.weight.data.normal_(std=k**-0.5)
    return made.requires_grad_(False)


def normal(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def close(mine, exact):
    """Within one rounding to bf16 (2^-8 relative) and what float32 sums of many terms leave."""
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.double(), exact, rtol=2**-8, atol=2e-3)


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_linear_multiplies_like_torch(isa, kernels, n, k, bias):
    plain = linear(n, k, bias)
    x = normal(max(ROWS), k)
    exact = nn.functional.linear(x.double(), plain.weight.double(), plain.bias.double() if bias else None)
    packed = PackedLinear(kernels, Matrix(kernels, plain), Scratch())
    for rows in ROWS:
        close(packed(x[:rows]), exact[:rows])


def test_a_row_does_not_depend_on_the_others(isa, kernels):
    """In whole blocks of weights, and in the last one, which has 16 rows."""
    packed = PackedLinear(kernels, Matrix(kernels, linear(912, 4864)), Scratch())
    x = normal(150, 4864)
    together = packed(x)
    for rows in ROWS:
        assert torch.equal(packed(x[:rows]), together[:rows])
    assert torch.equal(packed(x[77:78]), together[77:78])


def test_inputs_of_any_shape_and_stride_are_taken(isa, kernels):
    packed = PackedLinear(kernels, Matrix(kernels, linear(64, 32)), Scratch())
    x = normal(3, 5, 64)
    assert packed(x[..., :32]).shape == (3, 5, 64)
    assert torch.equal(packed(x[..., :32]), packed(x[..., :32].contiguous()))
    turned = normal(32, 6).T
    assert torch.equal(packed(turned), packed(turned.contiguous()))


@pytest.mark.parametrize("rows", [1, 15, 16, 33])
def test_kernels_stay_within_their_scratch(isa, kernels, marked_scratch, rows):
    PackedLinear(kernels, Matrix(kernels, linear(48, 96)), marked_scratch)(normal(rows, 96))
    assert marked_scratch.kept
    parts = (linear(160, 96), linear(160, 96), linear(96, 160))
    PackedMlp(kernels, *(Matrix(kernels, part) for part in parts), 0, marked_scratch)(normal(rows, 96))
    assert marked_scratch.kept


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("inner", [64, 160])
def test_a_packed_mlp_gives_what_its_parts_give(isa, kernels, name, inner):
    gate, up = (linear(inner, 96, bias=inner == 64, seed=s) for s in (1, 2))
    down, x = linear(96, inner, seed=3), normal(70, 96) * 3
    activation = ACT2FN[name]
    expected = {
        rows: down(activation(gate(x[:rows]).float()).bfloat16() * up(x[:rows])).double() for rows in ROWS
    }
    kind = {"silu": 0, "gelu_pytorch_tanh": 1, "gelu": 2}[name]
    packed = PackedMlp(kernels, *(Matrix(kernels, part) for part in (gate, up, down)), kind, Scratch())
    for rows in (1, 16, 17, 33, 64):
        # An inner number that is rounded the other way is off by 2^-8, and a sum of them by a few times that.
        torch.testing.assert_close(packed(x[:rows]).double(), expected[rows], rtol=2**-6, atol=1e-2)
        assert torch.equal(packed(x[:rows]), packed(x)[:rows])


@pytest.mark.parametrize("width", [32, 100, 896])
def test_a_packed_norm_is_llamas(isa, kernels, width):
    norm = LlamaRMSNorm(width, eps=1e-5).to(torch.bfloat16).requires_grad_(False)
    norm.weight.data.normal_()
    x = normal(37, width) * 5
    mine, theirs = PackedRmsNorm(kernels, norm)(x), norm(x)
    assert torch.isclose(mine.float(), theirs.float(), rtol=2**-7, atol=0).all()
    assert (mine != theirs).float().mean() < 0.01  # where a rounding falls the other way


def test_an_embedding_reads_rows_of_the_packed_head(isa, kernels):
    head = linear(1040, 64, bias=False)  # the last block has 16 rows
    rows = head.weight.clone()
    ids = torch.tensor([[0, 31, 32, 1023], [1024, 1039, 5, 5]])
    packed = PackedEmbedding(kernels, Matrix(kernels, head), None)
    assert torch.equal(packed(ids), rows[ids])


def test_what_the_kernels_cannot_take_stays(kernels):
    assert packable(linear(16, 32))
    assert not packable(linear(24, 32))
    assert not packable(linear(32, 48))
    assert not packable(nn.Linear(32, 32))
    assert not packable(nn.Embedding(32, 32, dtype=torch.bfloat16))
    offloaded = linear(32, 32)
    offloaded._hf_hook = object()
    assert not packable(offloaded)


def test_scratch_memory_grows_to_the_largest_and_stays(kernels):
    scratch = Scratch()
    first = scratch.take(1000)
    assert scratch.take(10) == first
    scratch.take(2000)
    assert scratch.n_bytes == 4000
    scratch.take(500)
    assert scratch.n_bytes == 4000
