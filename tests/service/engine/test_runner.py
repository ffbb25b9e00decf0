"""`model.generate` is the oracle: whatever a step packs, greedy tokens in float32 must be the same."""

import copy
import gc
import random
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from loader.batching import CONTINUOUS, ONE_AT_A_TIME
from loader.kv_layout import KvGroup, KvLayout
from service.engine.attention import ATTRIBUTE, UnsupportedAttention, layer_of
from service.engine.backends import TorchAttention
from service.engine.batch import Span
from service.engine.cpu.attention import NativeAttention
from service.engine.cpu.library import kernels
from service.engine.rows import Row
from service.engine.runner import Runner, make_runner
from service.engine.single import SingleRunner
from service.engine.types import DeviceLost

BLOCK, CONTEXT, CHUNK, CONCURRENCY = 4, 96, 24, 5
SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# Beside those of conftest.py.
MORE = {
    "gemma": {"head_dim": 8},
    "phi": {},
    "phi3": {"sliding_window": 11},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "starcoder2": {"sliding_window": 15},
    "smollm3": {},
}
FAMILIES = ("qwen2", "llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe", *MORE)
ONE_OF_EACH = ("qwen2", "gemma2", "gemma3_text", "qwen3_moe")  # full, capped, two windows, experts


@pytest.fixture(scope="module")
def model_of(tiny):
    """`model_of(family)`: a copy whose attention a runner may take over."""

    def make(family="qwen2"):
        if family not in MORE:
            return copy.deepcopy(tiny(family))
        torch.manual_seed(7)
        config = AutoConfig.for_model(family, **SMALL, **MORE[family])
        config.initializer_range = 0.3
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()

    return make


def layout_of(model, blocks=CONCURRENCY * CONTEXT // BLOCK):
    """A group for each window of the model."""
    config = model.config
    kinds = (
        getattr(config, "layer_types", None)
        or ["sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"]
        * config.num_hidden_layers
    )
    groups = {}
    for index, kind in enumerate(kinds):
        window = config.sliding_window if kind == "sliding_attention" else None
        groups.setdefault(window, []).append(index)
    return KvLayout(BLOCK, tuple(KvGroup(window, tuple(x), blocks) for window, x in groups.items()))


def runner_of(model, **options):
    layout = options.pop("layout", None) or layout_of(model)
    return Runner(model, "cpu", CONTEXT, CONCURRENCY, CHUNK, layout, **options)


def prompt(length, seed=1):
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(length, seed=length) for length in (1, BLOCK, 3 * BLOCK + 1, 30, 61)]


def generated(model, ids, tokens):
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


class Server:
    """Puts sequences into steps by chance, with scrambled blocks; gives back what windows have left."""

    def __init__(self, runner, prompts, tokens, seed=0):
        self.runner, self.tokens, self.random = runner, tokens, random.Random(seed)
        self.free = [self.random.sample(range(x.blocks), x.blocks) for x in runner.layout.groups]
        self.texts = [list(ids) for ids in prompts]
        self.goals = [len(ids) + tokens for ids in prompts]
        self.computed = [0] * len(prompts)
        self.tables = [tuple([] for _ in self.free) for _ in prompts]
        self.left = [[0] * len(self.free) for _ in prompts]  # blocks that were given back
        self.mixed = 0  # steps with a chunk beside a single token

    def run(self):
        while busy := [at for at, text in enumerate(self.texts) if len(text) < self.goals[at]]:
            self.step(busy)
        return [text[-self.tokens :] for text in self.texts]

    def step(self, busy):
        room, rows, numbers = CHUNK, [], []
        for number in self.random.sample(busy, self.random.randint(1, len(busy))):
            pending = len(self.texts[number]) - self.computed[number]
            count = min(pending, room, self.random.randint(1, 17))
            if count:
                room -= count
                numbers.append(number)
                rows.append(self.row(number, count))
        counts = {len(row.ids) for row in rows}
        self.mixed += 1 in counts and len(counts) > 1
        logits = iter(self.runner.step(rows))
        for number, row in zip(numbers, rows, strict=True):
            self.computed[number] += len(row.ids)
            if row.sample:
                self.texts[number].append(int(next(logits).argmax()))
            self.give_back(number)
        assert next(logits, None) is None

    def row(self, number, count):
        start = self.computed[number]
        for table, free in zip(self.tables[number], self.free, strict=True):
            while len(table) * BLOCK < start + count:
                table.append(free.pop())
        sample = start + count == len(self.texts[number])
        return Row(self.texts[number][start : start + count], start, self.tables[number], sample)

    def give_back(self, number):
        for at, group in enumerate(self.runner.layout.groups):
            gone = 0 if group.window is None else max(0, self.computed[number] + 1 - group.window) // BLOCK
            table = self.tables[number][at]
            for block in range(self.left[number][at], gone):
                self.free[at].insert(0, table[block])
                table[block] = 0
            self.left[number][at] = gone


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_and_single_tokens_in_one_step_give_the_tokens_of_generate(model_of, family):
    model = model_of(family)
    expected = [generated(model, ids, 25) for ids in PROMPTS]
    runner = runner_of(model)
    for seed in range(2):
        server = Server(runner, PROMPTS, 25, seed)
        assert server.run() == expected
        assert server.mixed > 5
        # Blocks of the first run hold what was left there: the second one must not see it.


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "starcoder2"])
def test_windows_need_no_more_blocks_than_the_layout_says(model_of, family):
    model = model_of(family)
    expected = [generated(model, ids, 30) for ids in PROMPTS[-1:]]
    blocks = {group.window: group.blocks_for(CONTEXT, 17, BLOCK) for group in layout_of(model).groups}
    layout = KvLayout(
        BLOCK, tuple(KvGroup(g.window, g.layers, blocks[g.window]) for g in layout_of(model).groups)
    )
    assert min(blocks.values()) < CONTEXT // BLOCK / 2
    assert Server(runner_of(model, layout=layout), PROMPTS[-1:], 30).run() == expected


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_logits_of_a_packed_step_are_those_of_a_forward_of_each(model_of, family):
    model = model_of(family)
    with torch.inference_mode():
        expected = [model(torch.tensor([ids])).logits[0, -1] for ids in (PROMPTS[1], PROMPTS[2])]
    runner = runner_of(model)
    rows = [Row(ids, 0, tables(model, at), True) for at, ids in enumerate((PROMPTS[1], PROMPTS[2]))]
    torch.testing.assert_close(runner.step(rows), torch.stack(expected), rtol=1e-4, atol=1e-4)


def tables(model, at=0):
    """Blocks for a full context, apart from those of another `at`."""
    width = CONTEXT // BLOCK
    return tuple(list(range(at * width, (at + 1) * width)) for _ in layout_of(model).groups)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_only_rows_that_sample_give_logits_and_none_may(model_of, family):
    model = model_of(family)
    runner = runner_of(model)
    rows = [Row(PROMPTS[at], 0, tables(model, at), sample=at == 1) for at in range(3)]
    alone = runner.step(rows[1:2]).clone()
    logits = runner.step(rows)
    assert logits.shape == (1, 300)
    torch.testing.assert_close(logits, alone)
    assert runner.step(rows[:1]).shape == (0, 300)


def test_a_full_context_can_be_used_to_the_last_token(model_of):
    model = model_of()
    runner = runner_of(model)
    for start in range(0, CONTEXT, CHUNK):
        logits = runner.step([Row(prompt(CONTEXT)[start : start + CHUNK], start, tables(model), True)])
    with torch.inference_mode():
        runner.close()
        expected = model(torch.tensor([prompt(CONTEXT)])).logits[0, -1:]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_token_beyond_the_context_is_refused(model_of):
    model = model_of()
    with pytest.raises(ValueError, match=f"there are blocks for {CONTEXT}"):
        runner_of(model).step([Row([1], CONTEXT, tuple([0] * 99 for _ in range(1)), True)])


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_rehearsal_changes_no_answer(model_of, family):
    model = model_of(family)
    expected = [generated(model, ids, 10) for ids in PROMPTS]
    runner = runner_of(model)
    runner.rehearse()
    assert Server(runner, PROMPTS, 10).run() == expected


@pytest.mark.parametrize(("concurrency", "chunk"), [(1, 1), (1, 8), (8, 1), (8, 8), (3, 96)])
def test_a_rehearsal_has_the_largest_steps_there_can_be(model_of, concurrency, chunk):
    model = model_of()
    steps = []
    runner = Runner(model, "cpu", CONTEXT, concurrency, chunk, layout_of(model))
    forward = runner._forward
    runner._forward = lambda step: (steps.append(step.main), forward(step))[1]
    runner.rehearse()
    assert max(len(batch.keep) for batch in steps) == min(concurrency, chunk)
    assert {batch.ids.shape[1] for batch in steps} >= {chunk}
    assert {span.length for batch in steps for span in batch.spans} == {CONTEXT}


@pytest.mark.parametrize(
    ("family", "kinds"), [("qwen2", 1), ("gemma2", 2), ("gemma3_text", 2), ("qwen3_moe", 1)]
)
def test_on_a_cpu_one_layer_of_each_kind_is_rehearsed(model_of, family, kinds):
    model = model_of(family)
    runner = runner_of(model)
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, *_: calls.append(module.layer_idx))
    runner.rehearse()
    assert len(set(calls)) == kinds
    assert len(calls) == 2 * kinds  # of the two largest steps


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2"])
def test_nothing_grows_while_stepping(model_of, family):
    runner = runner_of(model_of(family))
    Server(runner, PROMPTS, 5).run()

    def tensor_bytes():
        gc.collect()
        stores = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                  for x in gc.get_objects() if type(x) is torch.Tensor}  # fmt: skip
        return sum(stores.values())

    before, kv_bytes = tensor_bytes(), runner.kv_bytes
    Server(runner, PROMPTS, 20, seed=3).run()
    assert (tensor_bytes(), runner.kv_bytes) == (before, kv_bytes)


def test_the_pool_has_the_bytes_of_the_layout(model_of):
    model = model_of("gemma3_text")
    layout = layout_of(model, blocks=10)
    per_block = 2 * BLOCK * 2 * 8 * 4
    assert runner_of(model, layout=layout).kv_bytes == 4 * (10 + 1) * per_block


def test_a_failed_step_leaves_other_sequences_as_they_were(model_of):
    model = model_of()
    expected = [generated(model, ids, 12) for ids in PROMPTS]
    runner = runner_of(model)
    server = Server(runner, PROMPTS, 12)
    for _ in range(6):
        server.step(range(len(PROMPTS)))
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.step([Row([5] * 9, 0, ([server.free[0][-1], *server.free[0][:2]],), True)])
    hook.remove()
    runner.recover()
    assert [
        text[:12] for text in (x[len(p) :] for x, p in zip(finish(server), PROMPTS, strict=True))
    ] == expected


def finish(server):
    server.run()
    return server.texts


def test_after_an_error_nothing_holds_the_steps_tensors(model_of):
    model = model_of()
    runner = runner_of(model)
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.step([Row([5], 0, tables(model), True)])
    hook.remove()
    runner.recover()
    assert runner._current.step is None


def test_meanwhile_is_called_once_when_the_layers_begin(model_of):
    model, said = model_of(), []
    runner = runner_of(model)
    layers = model.model.layers
    hooks = [
        model.model.embed_tokens.register_forward_hook(lambda *_: said.append("embedded")),
        *(layer.register_forward_hook(lambda *_: said.append("layer")) for layer in layers),
    ]
    runner.step([Row([5], 0, tables(model), True)], lambda: said.append("meanwhile"))
    for hook in hooks:
        hook.remove()
    assert said == ["embedded", "meanwhile", *["layer"] * len(layers)]


def test_what_a_failed_step_had_to_call_is_forgotten(model_of):
    model, said = model_of(), []
    runner = runner_of(model)
    hook = model.model.embed_tokens.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.step([Row([5], 0, tables(model), True)], lambda: said.append("meanwhile"))
    hook.remove()
    runner.recover()
    runner.step([Row([5], 0, tables(model), True)])
    assert said == []


def test_a_device_that_cannot_add_is_lost(model_of, monkeypatch):
    runner = runner_of(model_of())
    runner.recover()

    def broken(*_args, **_kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        runner.recover()


def test_two_runners_live_side_by_side(model_of):
    models = [model_of("qwen2"), model_of("mistral")]
    expected = [[generated(model, ids, 8) for ids in PROMPTS] for model in models]
    servers = [Server(runner_of(model), PROMPTS, 8) for model in models]
    for _ in range(6):
        for server in servers:
            server.step(range(len(PROMPTS)))
    assert [
        [text[len(ids) :][:8] for text, ids in zip(finish(x), PROMPTS, strict=True)] for x in servers
    ] == expected


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_a_closed_runner_gives_the_model_its_own_attention_back(model_of, family):
    model = model_of(family)
    before, expected = model.config._attn_implementation, generated(model, PROMPTS[2], 8)
    runner = runner_of(model)
    assert model.config._attn_implementation != before
    assert layer_of(model.model.layers[0].self_attn)
    runner.close()
    runner.close()
    assert model.config._attn_implementation == before
    assert not hasattr(model.model.layers[0].self_attn, ATTRIBUTE)
    assert generated(model, PROMPTS[2], 8) == expected


def test_a_closed_runner_frees_its_blocks_while_the_model_lives_on(model_of):
    model = model_of()
    runner = runner_of(model)
    runner.step([Row([5], 0, tables(model), True)])
    blocks = [weakref.ref(store.keys) for store in runner._stores.values()]
    assert all(block() is not None for block in blocks)
    runner.close()
    gc.collect()
    assert all(block() is None for block in blocks)


def test_a_model_that_was_planned_otherwise_is_left_as_it_was(model_of):
    model = model_of()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedAttention, match=r"layers \[0, 1, 2, 3\] attend, and keys of \[0, 1\]"):
        runner_of(model, layout=KvLayout(BLOCK, (KvGroup(None, (0, 1), 40),)))
    assert model.config._attn_implementation == before


class FromTensors(TorchAttention):
    """Knows no more of a step than its tensors say, as what a graph has recorded."""

    recordable = True

    def attend(self, query, batch, scale, softcap):
        ends = batch.cu_tokens.tolist()
        spans = tuple(
            Span(first, end - first, start)
            for first, end, start in zip(ends[:-1], ends[1:], batch.starts.tolist(), strict=True)
        )
        return super().attend(query, replace(batch, spans=spans), scale, softcap)


class Recorded:
    """Stands for a CUDA graph."""

    replays = 0

    def __init__(self, work):
        self.work = work
        work()

    def replay(self):
        type(self).replays += 1
        self.work()


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_recorded_steps_give_the_same_tokens(model_of, family, monkeypatch):
    monkeypatch.setattr("service.engine.runner.backend_for", lambda layer, block_tokens: FromTensors)
    model = model_of(family)
    expected = [generated(model, ids, 25) for ids in PROMPTS]
    runner = runner_of(model, recorder=Recorded)
    runner.rehearse()
    Recorded.replays = 0
    server = Server(runner, PROMPTS, 25)
    assert server.run() == expected
    assert Recorded.replays > 10


def test_meanwhile_is_called_when_a_recorded_step_has_been_launched(model_of, monkeypatch):
    monkeypatch.setattr("service.engine.runner.backend_for", lambda layer, block_tokens: FromTensors)
    model, said = model_of(), []
    runner = runner_of(model, recorder=Recorded)
    runner.rehearse()
    Recorded.replays = 0
    runner.step([Row([5], 0, tables(model), True)], lambda: said.append(Recorded.replays))
    assert said == [1]


def test_a_model_that_cannot_be_recorded_is_rehearsed_and_served_all_the_same(model_of):
    def refuses(work):
        raise RuntimeError("operation not permitted when stream is capturing")

    model = model_of()
    expected = [generated(model, ids, 5) for ids in PROMPTS]
    runner = runner_of(model, recorder=refuses)
    runner.rehearse()
    assert Server(runner, PROMPTS, 5).run() == expected


@pytest.mark.skipif(kernels() is None, reason="the CPU kernels are not built")
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "gemma3_text", "phi3"])
def test_in_bf16_the_cpus_kernels_and_torch_give_like_logits(family, monkeypatch):
    torch.manual_seed(7)
    config = AutoConfig.for_model(family, **SMALL | {"hidden_size": 128}, **{"head_dim": 32})
    if getattr(config, "sliding_window", None):
        config.sliding_window = 20
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    groups = tuple(KvGroup(x.window, x.layers, 20) for x in layout_of(model).groups)
    rows = [
        Row(prompt(30)[start : start + 15], start, tuple([7, 3] for _ in groups), True) for start in (0, 15)
    ]

    def logits():
        runner = Runner(model, "cpu", CONTEXT, CONCURRENCY, CHUNK, KvLayout(32, groups))
        kinds = {type(layer_of(x.self_attn).backend) for x in model.model.layers}
        out = [runner.step([row]) for row in rows][-1]
        runner.close()
        return kinds, out

    kinds, ours = logits()
    assert kinds == {NativeAttention}
    monkeypatch.setattr("service.engine.runner.backend_for", lambda layer, block_tokens: TorchAttention)
    kinds, theirs = logits()
    assert kinds == {TorchAttention}
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05 * float(theirs.abs().max()))


def plan(model, batching):
    return SimpleNamespace(
        batching=batching, context=CONTEXT, concurrency=CONCURRENCY, chunk_tokens=CHUNK, kv=layout_of(model)
    )


def test_the_plan_says_which_runner_it_is(model_of):
    model = model_of()
    runner = make_runner(model, "cpu", plan(model, CONTINUOUS))
    assert isinstance(runner, Runner)
    assert (runner.context, runner.concurrency, runner.chunk_tokens) == (CONTEXT, CONCURRENCY, CHUNK)
    assert runner.prefix_reuse
    runner.close()
    single = make_runner(model, "cpu", plan(model, ONE_AT_A_TIME))
    assert isinstance(single, SingleRunner)
    assert (single.context, single.concurrency, single.chunk_tokens) == (CONTEXT, 1, CHUNK)
    assert single.layout == layout_of(model)


def test_cudnns_attention_which_plans_every_length_anew_is_off(model_of):
    torch.backends.cuda.enable_cudnn_sdp(True)
    model = model_of()
    make_runner(model, "cpu", plan(model, CONTINUOUS)).close()
    assert not torch.backends.cuda.cudnn_sdp_enabled()
