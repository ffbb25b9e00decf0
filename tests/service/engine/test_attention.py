"""Every backend against attention written as its definition: one token, one head, all keys it sees."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from loader.kv_layout import KvGroup, KvLayout
from service.engine import backends
from service.engine.attention import ATTRIBUTE, Attached, UnsupportedAttention, layer_of
from service.engine.backends import PaddedTorchAttention, TorchAttention, VarlenAttention, backend_for
from service.engine.batch import Batcher
from service.engine.cpu.attention import NativeAttention
from service.engine.cpu.library import kernels
from service.engine.pool import LayerShape, LayerStore
from service.engine.rows import Row

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 6, 2, 32, 300
native = pytest.mark.skipif(kernels() is None, reason="the CPU kernels are not built")
TORCH = (TorchAttention, PaddedTorchAttention)


class Sequence:
    """Queries, keys and values of one sequence [tokens, heads, head_dim], of which `start` are computed."""

    def __init__(self, start, count, dtype):
        self.start, self.count = start, count
        self.query, self.key, self.value = (
            torch.randn(start + count, heads, HEAD_DIM).to(dtype) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )

    def expected(self, window, softcap):
        """[count, heads, head_dim] in float64, of the last `count` tokens."""
        share = HEADS // KV_HEADS
        out = torch.empty(self.count, HEADS, HEAD_DIM, dtype=torch.float64)
        for token in range(self.start, self.start + self.count):
            low = 0 if window is None else max(0, token + 1 - window)
            for head in range(HEADS):
                keys = self.key[low : token + 1, head // share].double()
                values = self.value[low : token + 1, head // share].double()
                scores = keys @ self.query[token, head].double() * HEAD_DIM**-0.5
                if softcap is not None:
                    scores = softcap * (scores / softcap).tanh()
                out[token - self.start, head] = scores.softmax(0) @ values
        return out


class World:
    """A pool of one layer with scrambled blocks; what nobody wrote is NaN, as after a request that failed."""

    def __init__(self, backend, window, lengths, dtype=torch.float32, block_tokens=32, seed=0):
        torch.manual_seed(seed)
        blocks = sum(-(-(start + count) // block_tokens) for start, count in lengths)
        layout = KvLayout(block_tokens, (KvGroup(window, (0,), blocks),))
        shape = LayerShape(CPU, dtype, HEADS, KV_HEADS, HEAD_DIM, None)
        keys, values = (
            torch.full(x, torch.nan, dtype=dtype) for x in backend.shapes(shape, blocks + 1, block_tokens)
        )
        self.backend = backend(LayerStore(keys, values, 0, window, block_tokens))
        self.sequences = [Sequence(start, count, dtype) for start, count in lengths]
        self.batcher = Batcher(layout, CONTEXT, len(lengths), CONTEXT, CPU)
        free = random.Random(seed).sample(range(blocks), blocks)
        self.tables = [
            [free.pop() for _ in range(-(-(start + count) // block_tokens))] for start, count in lengths
        ]
        self._write_the_past()

    def _rows(self, first, count):
        return [
            Row([1] * count(x), first(x), (table,), True)
            for x, table in zip(self.sequences, self.tables, strict=True)
        ]

    def _write_the_past(self):
        for sequence, table in zip(self.sequences, self.tables, strict=True):
            if sequence.start:
                batch = self.batcher.build([Row([1] * sequence.start, 0, (table,), True)]).main
                self.backend.write(sequence.key[: sequence.start], sequence.value[: sequence.start], batch)

    def forget_what_left(self, window, block_tokens=32):
        """Give back blocks that no token of the step sees: their entries are 0."""
        for sequence, table in zip(self.sequences, self.tables, strict=True):
            for at in range(max(0, sequence.start + 1 - window) // block_tokens):
                table[at] = 0

    def step(self):
        return self.batcher.build(self._rows(lambda x: x.start, lambda x: x.count)).main

    def attend(self, softcap=None):
        """What each sequence gets."""
        batch = self.step()
        query, key, value = (
            torch.cat([getattr(x, name)[x.start :] for x in self.sequences])
            for name in ("query", "key", "value")
        )
        self.backend.write(key, value, batch)
        output = self.backend.attend(query, batch, HEAD_DIM**-0.5, softcap)
        assert output.shape == query.shape
        return output.split([x.count for x in self.sequences])


MIXED = [(0, 5), (70, 1), (31, 40), (0, 1), (63, 1), (5, 33)]
WINDOWS = (None, 1, 9, 32, 33, 250)


@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize("window", WINDOWS)
def test_prompts_and_single_tokens_of_one_step_see_what_they_should(backend, window):
    world = World(backend, window, MIXED)
    for got, sequence in zip(world.attend(), world.sequences, strict=True):
        torch.testing.assert_close(got.double(), sequence.expected(window, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize("window", [None, 9])
def test_scores_are_capped(backend, window):
    world = World(backend, window, MIXED)
    for got, sequence in zip(world.attend(softcap=0.7), world.sequences, strict=True):
        torch.testing.assert_close(got.double(), sequence.expected(window, 0.7), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", TORCH)
def test_blocks_that_the_window_has_left_are_not_read(backend):
    world = World(backend, 9, MIXED)
    world.forget_what_left(9)
    assert 0 in world.tables[1][:2]
    for got, sequence in zip(world.attend(), world.sequences, strict=True):
        torch.testing.assert_close(got.double(), sequence.expected(9, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("window", [None, 100])
def test_a_chunk_longer_than_what_is_masked_at_once_is_seen_whole(window):
    world = World(TorchAttention, window, [(20, backends.QUERIES_AT_ONCE + 15)])
    (got,) = world.attend()
    torch.testing.assert_close(got.double(), world.sequences[0].expected(window, None), rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 90), st.integers(1, 40)), min_size=1, max_size=5),
    st.sampled_from(WINDOWS),
    st.sampled_from([4, 32]),
)
def test_single_tokens_together_get_what_each_gets_alone(lengths, window, block_tokens):
    lengths = [(start, 1 if at % 3 else count) for at, (start, count) in enumerate(lengths)]
    alone = World(TorchAttention, window, lengths, block_tokens=block_tokens)
    together = World(PaddedTorchAttention, window, lengths, block_tokens=block_tokens)
    for got, want in zip(together.attend(), alone.attend(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_padded_copies_are_no_larger_than_one_full_context():
    world = World(PaddedTorchAttention, None, [(length, 1) for length in (3, 290, 60, 33, 64, 150)])
    batch = world.step()
    groups = list(world.backend._groups(list(range(6)), batch))
    assert sorted(row for group in groups for row in group) == list(range(6))
    room = batch.tables[0].shape[1]
    for group in groups:
        assert len(group) * max(world.backend._blocks(batch.spans[row]) for row in group) <= room
    assert len(groups) < 6


def test_on_the_cpu_a_token_gets_the_same_bits_whatever_else_is_in_the_batch():
    both = World(TorchAttention, None, [(70, 1), (31, 40)], dtype=torch.bfloat16)
    alone = World(TorchAttention, None, [(70, 1)], dtype=torch.bfloat16)
    for name in ("query", "key", "value"):
        setattr(alone.sequences[0], name, getattr(both.sequences[0], name))
    alone._write_the_past()
    assert torch.equal(both.attend()[0], alone.attend()[0])


# FlashAttention


def reference_varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
    window_size=(-1, -1), enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn over pages, with the checks of FlashAttention-2's C++."""
    rows, page = len(cu_seq_q) - 1, key.shape[1]
    assert key.shape == value.shape == (key.shape[0], page, KV_HEADS, HEAD_DIM)
    for ints, shape in ((cu_seq_q, (rows + 1,)), (cu_seq_k, (rows + 1,)), (seqused_k, (rows,))):
        assert ints.dtype == torch.int32
        assert ints.is_contiguous()
        assert ints.shape == shape
    assert block_table.dtype == torch.int32
    assert block_table.shape[0] == rows
    assert block_table.stride(-1) == 1
    assert query.stride(-1) == 1
    assert enable_gqa
    assert page % 256 == 0
    left, right = window_size
    out = torch.empty_like(query)
    for row in range(rows):
        low, high = int(cu_seq_q[row]), int(cu_seq_q[row + 1])
        used = int(seqused_k[row])
        assert 1 <= high - low <= max_q
        assert used <= max_k
        assert int(cu_seq_k[row + 1] - cu_seq_k[row]) == used
        pages = block_table[row, : -(-used // page)].long()
        keys, values = (x[pages].reshape(-1, KV_HEADS, HEAD_DIM)[:used] for x in (key, value))
        for at in range(low, high):
            here = used - (high - at)
            first = 0 if left < 0 else max(0, here - left)
            last = used if right < 0 else min(used, here + right + 1)
            k, v = (x[first:last].repeat_interleave(HEADS // KV_HEADS, 1) for x in (keys, values))
            weights = (torch.einsum("hd,khd->hk", query[at], k) * scale).softmax(-1)
            out[at] = torch.einsum("hk,khd->hd", weights, v)
    return out


@pytest.fixture
def flash(monkeypatch):
    """Keeps the options of every call."""
    calls = []

    def fake(*args, **options):
        calls.append(options | {"max_q": args[5], "max_k": args[6]})
        return reference_varlen_attn(*args, **options)

    monkeypatch.setattr(varlen, "varlen_attn", fake)
    return calls


@pytest.mark.parametrize("window", [None, 1, 9, 250])
def test_flash_attention_is_asked_for_the_same(flash, window):
    world = World(VarlenAttention, window, [*MIXED, (255, 2)], block_tokens=256)
    for got, sequence in zip(world.attend(), world.sequences, strict=True):
        torch.testing.assert_close(got.double(), sequence.expected(window, None), rtol=1e-4, atol=1e-5)
    (call,) = flash
    assert (call["max_q"], call["max_k"]) == (40, 257)
    assert call["num_splits"] == 1, "the order of sums does not depend on other rows"


@pytest.mark.parametrize("window", [None, 20, 33, 200])
def test_no_mask_is_over_a_number_of_keys_that_torch_gets_wrong_on_a_gpu(monkeypatch, window):
    seen = []

    def watched(query, keys, values, attn_mask=None, **options):
        seen.append((keys.shape[2], attn_mask is not None))
        return scaled_dot_product_attention(query, keys, values, attn_mask=attn_mask, **options)

    monkeypatch.setattr(backends, "scaled_dot_product_attention", watched)
    rows = [(0, 33), (0, 65), (64, 193), (1, 256), (5, 40), (10, 290)]
    for row in rows:
        world = World(PaddedTorchAttention, window, [row])
        (got,) = world.attend()
        expected = world.sequences[0].expected(window, None)
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    assert len(seen) > len(rows)
    assert not [keys for keys, masked in seen if masked and keys % 32 == 1]


@pytest.mark.parametrize("window", [None, 9])
def test_single_tokens_are_asked_for_in_the_form_that_reads_keys_once(flash, window):
    world = World(VarlenAttention, window, [(70, 1), (0, 1), (256, 1)], block_tokens=256)
    for got, sequence in zip(world.attend(), world.sequences, strict=True):
        torch.testing.assert_close(got.double(), sequence.expected(window, None), rtol=1e-4, atol=1e-5)
    assert flash[0]["window_size"] == ((-1, -1) if window is None else (8, 0))
    # In another form torch 2.13 puts splits together in the wrong places.
    assert flash[0]["num_splits"] == (None if window is None else 1)


def test_a_window_that_holds_every_row_is_none(flash):
    world = World(VarlenAttention, 257, [(70, 1), (0, 1), (256, 1)], block_tokens=256)
    for got, sequence in zip(world.attend(), world.sequences, strict=True):
        torch.testing.assert_close(got.double(), sequence.expected(257, None), rtol=1e-4, atol=1e-5)
    assert (flash[0]["window_size"], flash[0]["num_splits"]) == ((-1, -1), None)


def test_the_arguments_are_those_of_torchs_function():
    import inspect

    theirs = inspect.signature(varlen.varlen_attn).parameters
    assert list(theirs) == list(inspect.signature(reference_varlen_attn).parameters)


# Kernels of the CPU


@native
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_cpus_kernels_give_what_torch_gives(window, softcap):
    world = World(NativeAttention, window, MIXED, torch.bfloat16)
    world.forget_what_left(window or CONTEXT)
    for got, sequence in zip(world.attend(softcap), world.sequences, strict=True):
        expected = sequence.expected(window, softcap)
        torch.testing.assert_close(got.double(), expected, rtol=2e-2, atol=2e-2)


@native
def test_the_cpus_kernels_read_heads_that_lie_in_a_fused_projection():
    world = World(NativeAttention, None, [(3, 4)], torch.bfloat16)
    sequence = world.sequences[0]
    fused = torch.cat([sequence.query, sequence.key, sequence.value], dim=1)
    parts = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
    want = world.attend()[0]
    sequence.query, sequence.key, sequence.value = parts
    assert torch.equal(world.attend()[0], want)


# Which backend serves what


def shape(device="cpu", dtype=torch.bfloat16, head_dim=128, softcap=None):
    return LayerShape(torch.device(device), dtype, 8, 2, head_dim, softcap)


@pytest.fixture
def gpu(monkeypatch):
    """`gpu(major, minor)`: a card of that compute capability."""

    def card(*capability):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return card


@pytest.mark.parametrize(
    ("capability", "layer", "block_tokens", "wanted"),
    [
        ((8, 0), shape("cuda"), 256, VarlenAttention),
        ((9, 0), shape("cuda", torch.float16, 256), 512, VarlenAttention),
        ((7, 5), shape("cuda", torch.float16), 256, PaddedTorchAttention),
        ((8, 0), shape("cuda", torch.float32), 256, PaddedTorchAttention),
        ((8, 0), shape("cuda", head_dim=264), 256, PaddedTorchAttention),
        ((8, 0), shape("cuda", head_dim=100), 256, PaddedTorchAttention),
        ((8, 0), shape("cuda", softcap=50.0), 256, PaddedTorchAttention),
        ((8, 0), shape("cuda"), 32, PaddedTorchAttention),
        ((8, 0), shape(dtype=torch.float32), 32, TorchAttention),
        ((8, 0), shape(head_dim=80), 32, TorchAttention),
        ((8, 0), shape(), 64, TorchAttention),
    ],
)
def test_a_layer_gets_the_fastest_backend_that_serves_it(gpu, capability, layer, block_tokens, wanted):
    gpu(*capability)
    assert backend_for(layer, block_tokens) is wanted


def test_without_kernels_the_cpu_runs_torch(monkeypatch):
    monkeypatch.setattr("service.engine.cpu.attention.kernels", lambda: None)
    assert backend_for(shape(), 32) is TorchAttention


@native
def test_with_kernels_bf16_on_the_cpu_runs_them():
    assert backend_for(shape(), 32) is NativeAttention


# What is not served is refused at the start, by name


class Module(nn.Module):
    layer_idx = 0


class Model(nn.Module):
    """One attention module that asks for `options`."""

    def __init__(self, value_dim=8, **options):
        super().__init__()
        self.attention, self.options, self.value_dim = Module(), options, value_dim
        self.config = self
        self._attn_implementation = "sdpa"

    def get_text_config(self):
        return self

    def set_attn_implementation(self, name):
        self._attn_implementation = name

    def forward(self):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attend = ALL_ATTENTION_FUNCTIONS[self._attn_implementation]
        query, key, value = (
            torch.ones(1, 4, 1, 8),
            torch.ones(1, 2, 1, 8),
            torch.ones(1, 2, 1, self.value_dim),
        )
        return attend(self.attention, query, key, value, **{"attention_mask": None, **self.options})


LAYOUT = KvLayout(4, (KvGroup(None, (0,), 2),))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model(s_aux=torch.ones(4)), "Module asks for s_aux"),
        (Model(position_bias=torch.ones(1)), "position_bias"),
        (Model(attention_mask=torch.ones(1, 1)), "attention_mask"),
        (Model(dropout=0.1), "dropout"),
        (Model(is_causal=False), "is_causal=False"),
        (Model(value_dim=4), r"keys \[1, 2, 1, 8\] and values \[1, 2, 1, 4\]"),
    ],
)
def test_what_blocks_cannot_serve_is_refused_by_name(model, message):
    with pytest.raises(UnsupportedAttention, match=message):
        Attached(model).discover(LAYOUT, model)


def test_a_first_pass_tells_what_each_layer_keeps():
    model = Model(softcap=30.0, dropout=0.0, sliding_window=5)
    attached = Attached(model)
    assert attached.discover(LAYOUT, model) == {0: LayerShape(CPU, torch.float32, 4, 2, 8, 30.0)}
    assert not hasattr(model.attention, ATTRIBUTE)
    assert layer_of(model.attention) is None


@pytest.mark.parametrize("layers", [(), (0, 1), (1,)])
def test_layers_that_were_not_planned_or_do_not_attend_are_refused(layers):
    model = Model()
    layout = KvLayout(4, (KvGroup(None, layers, 2),))
    with pytest.raises(UnsupportedAttention, match=r"layers \[0\] attend, and keys of"):
        Attached(model).discover(layout, model)


def test_a_layer_that_attends_twice_is_refused():
    model = Model()
    with pytest.raises(UnsupportedAttention, match=r"layers \[0, 0\] attend"):
        Attached(model).discover(LAYOUT, lambda: (model(), model()))


def test_a_module_without_a_number_is_refused():
    model = Model()
    model.attention.layer_idx = None
    with pytest.raises(UnsupportedAttention, match="Module has no layer_idx"):
        Attached(model).discover(LAYOUT, model)


def test_a_model_with_attention_of_its_own_is_refused_and_left_as_it_was():
    model = Model()
    model.set_attn_implementation = lambda name: None
    with pytest.raises(UnsupportedAttention, match="Model does not take attention from outside"):
        Attached(model)
    assert model._attn_implementation == "sdpa"


def test_the_reference_of_these_tests_is_attention():
    sequence = Sequence(0, 3, torch.float32)
    share = HEADS // KV_HEADS
    k, v = (x.repeat_interleave(share, 1).transpose(0, 1) for x in (sequence.key, sequence.value))
    want = nn.functional.scaled_dot_product_attention(sequence.query.transpose(0, 1), k, v, is_causal=True)
    got = sequence.expected(None, None)
    assert math.isclose(float((got - want.transpose(0, 1)).abs().max()), 0, abs_tol=1e-5)
