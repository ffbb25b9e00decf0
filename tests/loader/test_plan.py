"""loader/plan.py: make_plan over hundreds of budgets, by arithmetic alone."""

import json
import re
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.budget import MemoryBudget, format_bytes
from loader.checkpoint import ModelSpec, read
from loader.errors import BadPlanRequest, BudgetExceeded, UnsupportedModel
from loader.footprint import measure
from loader.placement import Placer, Setting
from loader.plan import make_plan

GB = 10**9
PLENTY = 10**15
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
HALF |= {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
# With one KV head, a chunk of 128 tokens fewer frees more than 256 tokens of context take.
ONE_KV_HEAD = HALF | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}
ONE_KV_HEAD |= {"num_key_value_heads": 1}


@pytest.fixture(scope="module")
def specs(tmp_path_factory, fake_checkpoint, configs):
    """Headers of Qwen2.5-0.5B (tied), of a larger one with one KV head, of Qwen2.5-7B and Llama-3.1-70B."""
    qwen, llama = configs["qwen2-7b"], configs["llama3-70b"]
    named = {"0.5b": qwen | HALF, "one kv head": qwen | ONE_KV_HEAD, "7b": qwen, "70b": llama}
    folder = tmp_path_factory.mktemp("models")
    return {name: read(fake_checkpoint(folder / name, config)) for name, config in named.items()}


def gpu(limit, **places):
    return MemoryBudget(("cuda:0",), {"cuda:0": limit, **places})


def cpu(limit, **places):
    return MemoryBudget(("cpu",), {"cpu": limit, **places})


def two_gpus(first, second, **places):
    return MemoryBudget(("cuda:0", "cuda:1"), {"cuda:0": first, "cuda:1": second, **places})


def with_main(budget, limit):
    return replace(budget, limits={**budget.limits, budget.compute[0]: limit})


def refusal(spec, budget, **request):
    with pytest.raises(BudgetExceeded) as caught:
        make_plan(spec, budget, **request)
    return caught.value


def on(plan, device):
    return next(d for d in plan.devices if d.device == device)


def given_up(plan):
    """What was given up, in order: the words before the colon."""
    return [sentence.split(":")[0] for sentence in plan.given_up]


# Hundreds of budgets: (model, main device's limit -> budget, limits)

SWEEPS = {
    "7b on a GPU with RAM and disk": (
        "7b", lambda n: gpu(n, cpu=6 * GB, disk=9 * GB), range(GB // 2, 20 * GB, GB // 2),
    ),
    "7b on a GPU alone": ("7b", lambda n: gpu(n, cpu=0, disk=0), range(15_800_000_000, 18 * GB, GB // 8)),
    "7b on the CPU with a disk": ("7b", lambda n: cpu(n, disk=20 * GB), range(GB // 5, 18 * GB, 4 * GB // 5)),
    "7b on two GPUs": (
        "7b", lambda n: two_gpus(n, 6 * GB, cpu=4 * GB, disk=0), range(6 * GB, 15 * GB, GB // 2),
    ),
    "0.5b on a GPU with RAM": (
        "0.5b", lambda n: gpu(n, cpu=2 * GB), range(4 * GB // 5, 5 * GB // 2, GB // 35),
    ),
    "0.5b on the CPU with a small disk": (
        "0.5b", lambda n: cpu(n, disk=GB // 5), range(4 * GB // 5, 2 * GB, GB // 40),
    ),
    "70b on a GPU with RAM and disk": (
        "70b", lambda n: gpu(n, cpu=64 * GB, disk=40 * GB), range(36 * GB, 170 * GB, 15 * GB),
    ),
}  # fmt: skip
SWEPT = [pytest.param(name, id=name) for name in SWEEPS]


@pytest.fixture(scope="module")
def sweeps(specs):
    """name -> [(budget, plan or None)], from small budgets to large ones."""

    def swept(model, of, limits):
        for limit in limits:
            try:
                yield of(limit), make_plan(specs[model], of(limit))
            except BudgetExceeded:
                yield of(limit), None

    return {name: list(swept(*sweep)) for name, sweep in SWEEPS.items()}


def plans(sweep):
    return [plan for _, plan in sweep if plan]


@pytest.mark.parametrize("name", SWEPT)
def test_no_device_is_ever_planned_beyond_its_budget(sweeps, name):
    for budget, plan in sweeps[name]:
        for device in plan.devices if plan else ():
            assert 0 <= device.peak_bytes <= device.budget_bytes == budget.limits[device.device]


@pytest.mark.parametrize("name", SWEPT)
def test_every_byte_is_either_resident_or_offloaded(sweeps, name):
    for budget, plan in sweeps[name]:
        if plan:
            held = {device.device: device.weights_bytes for device in plan.devices}
            resident = sum(n_bytes for device, n_bytes in held.items() if device in budget.compute)
            assert plan.resident_bytes == resident
            assert plan.offloaded_bytes == sum(held.values()) - resident
            assert plan.resident_bytes + plan.offloaded_bytes == plan.weights_bytes


@pytest.mark.parametrize("name", SWEPT)
def test_what_fits_at_one_budget_fits_at_every_larger_one(sweeps, name):
    fits = [plan is not None for _, plan in sweeps[name]]
    assert fits == sorted(fits)
    assert fits[-1]
    assert not fits[0]


@pytest.mark.parametrize("name", SWEPT)
def test_a_larger_budget_never_gives_more_up(sweeps, name):
    """Sooner a smaller chunk, then a shorter context, and only then weights."""
    for small, large in zip(plans(sweeps[name]), plans(sweeps[name])[1:], strict=False):
        assert large.context >= small.context
        if small.offloaded_bytes == 0:
            assert large.offloaded_bytes == 0
            assert large.chunk_tokens >= small.chunk_tokens
        elif large.chunk_tokens == small.chunk_tokens:
            assert large.offloaded_bytes <= small.offloaded_bytes


@pytest.mark.parametrize("name", SWEPT)
def test_weights_leave_only_when_everything_else_has_been_given_up(sweeps, name):
    for plan in plans(sweeps[name]):
        if plan.offloaded_bytes:
            assert plan.context == 2048
            assert plan.chunk_tokens in (256, 128, 64)
            assert given_up(plan) == ["prefill chunk", "context", "resident weights"]
        elif plan.context < 8192:
            assert plan.chunk_tokens <= 256
            assert given_up(plan) == ["prefill chunk", "context"]


@pytest.mark.parametrize("name", SWEPT)
def test_max_memory_leaves_room_for_all_that_is_not_weights(sweeps, name):
    for budget, plan in sweeps[name]:
        for device in plan.devices if plan else ():
            key = int(device.device[5:]) if device.device.startswith("cuda:") else device.device
            assert plan.max_memory[key] == device.budget_bytes - device.peak_bytes + device.weights_bytes
            assert device.weights_bytes <= plan.max_memory[key] <= budget.limits[device.device]


def test_sweeps_meet_every_kind_of_plan(sweeps):
    found = [plan for sweep in sweeps.values() for plan in plans(sweep)]
    assert sum(len(sweep) for sweep in sweeps.values()) > 200
    assert {2048, 256} < {plan.chunk_tokens for plan in found}
    contexts = {plan.context for plan in found}
    assert {2048, 8192} < contexts
    assert not [context for context in contexts if context % 256]
    used = {frozenset(device.device for device in plan.devices) for plan in found}
    assert {frozenset(devices.split()) for devices in ("cpu", "cpu disk", "cuda:0", "cuda:0 cuda:1")} <= used
    assert {frozenset(devices.split()) for devices in ("cuda:0 cpu", "cuda:0 cpu disk")} <= used


# The order in which things are given up

# (chunk, context), and what follows when there is one byte less
STEPS = [
    ((2048, 8192), (1024, 8192)),
    ((1024, 8192), (512, 8192)),
    ((512, 8192), (256, 8192)),
    ((256, 8192), (256, 8192 - 256)),
    ((256, 5120), (256, 5120 - 256)),
    ((256, 2048 + 256), (256, 2048)),
    ((256, 2048), (128, 2048)),
    ((128, 2048), (64, 2048)),
]


def needed(spec, budget, chunk, context, blocks=None):
    """Bytes of the main device that hold the whole model, the pool and one step of as many rows as usual."""
    rows = 16 if budget.compute[0] == "cpu" else 64
    placed = Placer(measure(spec), budget).resident(Setting(chunk, context, rows, blocks), PLENTY)
    return placed.devices[0].peak_bytes


@pytest.mark.parametrize(("name", "kind"), [("7b", gpu), ("0.5b", cpu), ("one kv head", cpu)])
def test_chunk_context_and_again_chunk_are_given_up_in_that_order_to_the_byte(specs, name, kind):
    spec, budget = specs[name], kind(PLENTY, cpu=20 * GB) if kind is gpu else kind(PLENTY, disk=20 * GB)
    for setting, lesser in STEPS:
        threshold = needed(spec, budget, *setting)
        exact, short = (make_plan(spec, with_main(budget, threshold - missing)) for missing in (0, 1))
        assert (exact.chunk_tokens, exact.context, exact.offloaded_bytes) == (*setting, 0)
        assert exact.devices[0].free_bytes == 0
        assert (short.chunk_tokens, short.context, short.offloaded_bytes) == (*lesser, 0)


@pytest.mark.parametrize(("name", "kind"), [("7b", gpu), ("0.5b", cpu), ("one kv head", cpu)])
def test_weights_leave_after_that_and_chunks_are_256_tokens_again(specs, name, kind):
    spec, budget = specs[name], kind(PLENTY, cpu=20 * GB) if kind is gpu else kind(PLENTY, disk=20 * GB)
    short = make_plan(spec, with_main(budget, needed(spec, budget, 64, 2048) - 1))
    assert (short.chunk_tokens, short.context) == (256, 2048)
    assert short.offloaded_bytes > 0


def test_nothing_is_given_up_when_there_is_room(specs):
    plan = make_plan(specs["7b"], gpu(50 * GB, cpu=0))
    assert (plan.given_up, plan.offloaded_bytes) == ((), 0)
    assert (plan.context, plan.chunk_tokens, plan.concurrency) == (8192, 2048, 64)
    assert plan.kv_tokens == 64 * 8192
    assert not any("KV pool" in note for note in plan.notes)


# The pool


@pytest.mark.parametrize(("name", "kind"), [("7b", gpu), ("0.5b", cpu), ("one kv head", cpu)])
def test_the_pool_takes_what_is_left_to_the_block_and_is_given_up_before_anything_else(specs, name, kind):
    spec, budget = specs[name], kind(PLENTY, cpu=0) if kind is gpu else kind(PLENTY, disk=0)
    size = 256 if kind is gpu else 32
    one, rows = 8192 // size, 64 if kind is gpu else 16
    for blocks in (one, one + 1, 3 * one + 7, rows * one):
        threshold = needed(spec, budget, 2048, 8192, blocks)
        plan = make_plan(spec, with_main(budget, threshold))
        assert (plan.kv.block_tokens, plan.kv.groups[0].blocks) == (size, blocks)
        assert (plan.kv_tokens, plan.devices[0].free_bytes) == (blocks * size, 0)
        assert (plan.chunk_tokens, plan.context, plan.concurrency) == (2048, 8192, rows)
        short = make_plan(spec, with_main(budget, threshold - 1))
        if blocks > one:
            assert (short.kv_tokens, short.chunk_tokens) == ((blocks - 1) * size, 2048)
        else:
            assert (short.kv_tokens, short.chunk_tokens) == (8192, 1024)


def test_the_pool_is_at_least_one_context_and_at_most_one_for_each_row(specs):
    assert make_plan(specs["0.5b"], cpu(100 * GB)).kv_tokens == 16 * 8192
    assert make_plan(specs["0.5b"], gpu(100 * GB)).kv_tokens == 64 * 8192
    assert make_plan(specs["0.5b"], cpu(100 * GB), context=100, concurrency=3).kv_tokens == 3 * 128
    assert make_plan(specs["0.5b"], gpu(100 * GB), context=100, concurrency=3).kv_tokens == 3 * 256


@pytest.mark.parametrize("name", SWEPT)
def test_there_is_always_a_pool_for_one_context_and_a_larger_budget_never_has_a_smaller_one(sweeps, name):
    found = plans(sweeps[name])
    for plan in found:
        assert plan.context <= plan.kv_tokens <= plan.context * plan.concurrency
        assert plan.kv_tokens - plan.context < plan.kv.block_tokens or not plan.given_up
    pools = [plan.kv_tokens for plan in found]
    assert pools == sorted(pools)


def test_who_asked_for_more_conversations_than_are_held_is_told_that_they_were_given_up(specs):
    plan = make_plan(specs["7b"], gpu(20 * GB, cpu=0), concurrency=20)
    held = plan.kv_tokens // 8192
    assert 1 < held < 20
    assert given_up(plan) == ["KV pool"]
    assert plan.given_up[0].startswith(f"KV pool: 163,840 -> {plan.kv_tokens:,} tokens, which frees ")
    assert plan.given_up[0].endswith(f"{held} conversations of 8,192 at once, more when they are shorter")
    assert not any("KV pool" in note for note in plan.notes)


def test_who_did_not_is_told_how_many_there_are(specs):
    plan = make_plan(specs["7b"], gpu(20 * GB, cpu=0))
    (note,) = (note for note in plan.notes if "KV pool" in note)
    assert note == (
        f"KV pool: {plan.kv_tokens:,} tokens: {plan.kv_tokens // 8192} conversations of 8,192 at once, "
        "more when they are shorter."
    )
    assert plan.given_up == ()
    offloaded = make_plan(specs["7b"], gpu(8 * GB, cpu=20 * GB))
    assert any("2,048 tokens: one conversation of 2,048 at once" in note for note in offloaded.notes)


def test_every_token_of_the_pool_has_its_bytes_in_every_layer(specs):
    plan = make_plan(specs["7b"], cpu(20 * GB), context=5000, concurrency=7)
    (group,) = plan.kv.groups
    assert (group.window, group.layers, group.blocks) == (None, tuple(range(28)), 7 * -(-5000 // 32))
    assert plan.devices[0].kv_bytes == (group.blocks + 1) * 32 * 57_344


def windowed(specs, **others):
    """The 0.5B with a window of 512 tokens in layers 10 to 23."""
    window = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 10, **others}
    return replace(specs["0.5b"], config={**specs["0.5b"].config, **window})


def test_layers_with_a_window_have_a_group_with_no_more_blocks_than_their_rows_can_hold(specs):
    plan = make_plan(windowed(specs), cpu(20 * GB), concurrency=4)
    full, sliding = plan.kv.groups
    assert (full.window, full.layers, full.blocks) == (None, tuple(range(10)), 4 * 256)
    one = -(-(511 + 2048) // 32) + 1
    assert (sliding.window, sliding.layers, sliding.blocks) == (512, tuple(range(10, 24)), 4 * one)
    per_layer = 2 * 2 * 64 * 2
    held = 10 * (full.blocks + 1) + 14 * (sliding.blocks + 1)
    assert plan.devices[0].kv_bytes == held * 32 * per_layer
    assert plan.kv_tokens == 4 * 8192


def test_a_model_of_sliding_layers_alone_needs_no_more_than_its_windows(specs):
    spec = windowed(specs, max_window_layers=0)
    one = -(-(511 + 2048) // 32) + 1
    (group,) = make_plan(spec, cpu(20 * GB), concurrency=4).kv.groups
    assert (group.window, group.blocks) == (512, 4 * one)
    threshold = Placer(measure(spec), cpu(0)).resident(Setting(2048, 8192, 16), PLENTY).devices[0].peak_bytes
    tight = make_plan(spec, cpu(threshold))
    assert tight.kv.groups[0].blocks == one
    assert tight.devices[0].free_bytes == 0


LIMITS = st.integers(600_000_000, 6 * GB)


@settings(deadline=None, max_examples=300)
@given(
    limit=LIMITS, more=st.integers(1, GB), context=st.none() | st.integers(1, 32_768),
    rows=st.none() | st.integers(1, 200), kind=st.sampled_from([gpu, cpu]),
    window=st.sampled_from([None, 24, 5]),
)  # fmt: skip
def test_any_plan_keeps_the_budget_and_holds_one_context(specs, limit, more, context, rows, kind, window):
    spec = specs["0.5b"] if window is None else windowed(specs, max_window_layers=window)
    asked = {"context": context, "concurrency": rows}
    places = {"cpu": 0, "disk": GB // 3} if kind is gpu else {"disk": GB // 3}
    try:
        small = make_plan(spec, kind(limit, **places), **asked)
    except BudgetExceeded:
        return
    large = make_plan(spec, kind(limit + more, **places), **asked)
    for plan in (small, large):
        first, size = plan.kv.groups[0], plan.kv.block_tokens
        one = first.blocks_for(plan.context, plan.chunk_tokens, size)
        assert all(0 <= device.peak_bytes <= device.budget_bytes for device in plan.devices)
        assert one <= first.blocks <= plan.concurrency * one
        assert plan.chunk_tokens >= plan.concurrency
        for group in plan.kv.groups[1:]:
            least = group.blocks_for(plan.context, plan.chunk_tokens, size)
            assert least <= group.blocks <= min(first.blocks, plan.concurrency * least)
        assert sorted(layer for group in plan.kv.groups for layer in group.layers) == list(range(24))
    assert (large.context, large.concurrency) >= (small.context, small.concurrency)
    if large.chunk_tokens == small.chunk_tokens:
        assert large.kv_tokens >= small.kv_tokens
    assert bool(large.offloaded_bytes) <= bool(small.offloaded_bytes)


# Requests that run one at a time


def linear(specs):
    """LFM2's shape of layers, in the size of the 0.5B."""
    kinds = ["conv", "full_attention"] * 12
    config = {**specs["0.5b"].config, "model_type": "lfm2", "layer_types": kinds, "conv_L_cache": 3}
    return replace(specs["0.5b"], config=config)


@pytest.mark.parametrize("asked", [None, 1, 5])
def test_a_model_that_cannot_be_batched_runs_one_request_at_a_time_and_says_so(specs, asked):
    plan = make_plan(linear(specs), cpu(20 * GB), concurrency=asked)
    assert (plan.batching, plan.concurrency) == ("one at a time", 1)
    (note,) = (note for note in plan.notes if "one at a time" in note)
    together = ", not 5 together" if asked == 5 else ""
    assert note == (
        f"lfm2 has convolution layers: requests run one at a time{together}, with the model's own cache."
    )
    assert plan.given_up == ()


def test_such_a_model_is_planned_with_its_own_cache(specs):
    spec = linear(specs)
    plan = make_plan(spec, cpu(20 * GB), context=1000)
    (group,) = plan.kv.groups
    assert (group.window, group.layers, group.blocks) == (None, tuple(range(24)), 32)
    footprint = measure(spec)
    (device,) = plan.devices
    assert device.kv_bytes == footprint.kv_bytes(1000, 1000)
    assert device.activation_bytes == footprint.activation_bytes(1000, 1000)
    assert device.logits_bytes == footprint.logits_bytes(1)


def test_such_a_model_gives_up_chunk_context_and_weights_as_any_other(specs):
    budgets = range(700_000_000, 1_200_000_000, 25_000_000)
    found = [make_plan(linear(specs), cpu(limit, disk=GB)) for limit in budgets]
    for small, large in pairwise(found):
        assert small.devices[0].peak_bytes <= small.devices[0].budget_bytes
        assert (large.context, large.kv_tokens) >= (small.context, small.kv_tokens)
    assert {plan.batching for plan in found} == {"one at a time"}
    assert found[0].offloaded_bytes > 0 == found[-1].offloaded_bytes


def test_what_was_given_up_is_told_with_what_it_frees(specs):
    plan = make_plan(specs["7b"], gpu(8 * GB, cpu=20 * GB))
    chunk, context, weights = plan.given_up
    assert chunk.startswith("prefill chunk: 2,048 -> 256 tokens, which frees ")
    assert context == f"context: 8,192 -> 2,048 tokens, which frees {format_bytes(6144 * 57_344)} of KV cache"
    assert f"{format_bytes(plan.offloaded_bytes)} in all" in weights
    assert weights.endswith(f"through {format_bytes(plan.devices[0].staging_bytes)} of staging")


def test_weights_leave_from_the_last_mlp_to_the_first_and_embeddings_at_the_very_last(specs):
    spec = specs["7b"]
    some = make_plan(spec, gpu(12 * GB, cpu=20 * GB)).device_map
    assert some["model.embed_tokens"] == some["lm_head"] == some["model.layers.0"] == 0
    away = [module for module, place in some.items() if place == "cpu"]
    layers = sorted({int(module.split(".")[2]) for module in away if ".mlp" in module})
    assert layers == list(range(layers[0], 28))
    assert (
        len([module for module in away if ".mlp" not in module]) <= 1
    )  # a small one may fill what is missing
    least = refusal(spec, gpu(GB // 2, cpu=20 * GB)).smallest_bytes
    nothing_left = make_plan(spec, gpu(least, cpu=20 * GB)).device_map
    assert nothing_left["model.embed_tokens"] == nothing_left["lm_head"] == "cpu"
    assert nothing_left["model.norm"] == nothing_left["model.layers.27.input_layernorm"] == 0


def test_when_little_has_to_leave_small_modules_alone_do(specs):
    away = [
        m
        for m, place in make_plan(specs["7b"], gpu(15 * GB, cpu=20 * GB)).device_map.items()
        if place == "cpu"
    ]
    assert away
    assert not [module for module in away if ".mlp" in module]


def test_a_tied_embedding_stays_however_small_the_budget(specs):
    least = refusal(specs["0.5b"], gpu(GB // 2, cpu=20 * GB)).smallest_bytes
    plan = make_plan(specs["0.5b"], gpu(least, cpu=20 * GB))
    assert plan.device_map["model.embed_tokens"] == plan.device_map["lm_head"] == 0
    assert plan.resident_bytes > 151_936 * 896 * 2


# What the user fixed


@pytest.mark.parametrize("context", [100, 2048, 8192, 32_768])
def test_a_context_that_was_asked_for_is_never_shortened(specs, context):
    for limit in range(5 * GB, 24 * GB, 5 * GB):
        plan = make_plan(specs["7b"], gpu(limit, cpu=20 * GB), context=context)
        assert plan.context == context <= plan.kv_tokens
        assert plan.chunk_tokens <= max(context, plan.concurrency)
        assert "context" not in given_up(plan)


def test_a_context_that_does_not_fit_is_refused_rather_than_shortened(specs):
    budget = gpu(16_300_000_000, cpu=0)
    assert make_plan(specs["7b"], budget).context < 8192
    error = refusal(specs["7b"], budget, context=32_768)
    assert "a shorter --context (each token takes 57,344 bytes)" in error.hint


def test_the_pool_has_a_context_for_each_of_the_concurrent_requests_where_there_is_room(specs):
    one, four = (make_plan(specs["7b"], gpu(40 * GB, cpu=0), concurrency=n) for n in (1, 4))
    assert on(one, "cuda:0").kv_bytes == (8192 + 256) * 57_344
    assert on(four, "cuda:0").kv_bytes == (4 * 8192 + 256) * 57_344
    assert (four.kv_tokens, four.context, four.concurrency) == (4 * 8192, 8192, 4)
    assert four.kv_bytes_per_token == one.kv_bytes_per_token == 57_344


def test_concurrency_is_never_given_up(specs):
    for limit in (4 * GB, 9 * GB, 14 * GB, 20 * GB):
        assert make_plan(specs["7b"], gpu(limit, cpu=20 * GB), concurrency=3).concurrency == 3
    error = refusal(specs["7b"], gpu(2 * GB, cpu=0, disk=0), concurrency=3)
    assert "a --concurrency below 3" in error.hint


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_that_was_asked_for_is_the_one_that_counts(specs, dtype):
    plan = make_plan(specs["0.5b"], cpu(9 * GB), dtype=dtype)
    width = 2 if dtype == "float16" else 4
    assert (plan.dtype, plan.kv_bytes_per_token) == (dtype, 24 * 2 * 2 * 64 * width)
    assert plan.weights_bytes == sum(t.n_bytes // 2 * width for t in specs["0.5b"].tensors) + 2 * 32 * 4


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"context": 0}, "1 to 32,768"),
        ({"context": -5}, "1 to 32,768"),
        ({"context": 32_769}, "context of 32,769 tokens"),
        ({"concurrency": 0}, "at least 1"),
        ({"concurrency": -1}, "at least 1"),
        ({"dtype": "int8"}, "'int8' is not one of"),
    ],
)
def test_a_request_that_the_model_cannot_have_is_refused(specs, request_, words):
    with pytest.raises(BadPlanRequest, match=words):
        make_plan(specs["7b"], gpu(PLENTY), **request_)


def test_a_model_of_short_sequences_is_planned_for_all_it_takes(tmp_path, fake_checkpoint, configs):
    plan = make_plan(read(fake_checkpoint(tmp_path, configs["tiny"])), cpu(GB))
    assert (plan.context, plan.chunk_tokens) == (128, 128)
    assert plan.given_up == plan.notes == ()


def test_a_config_that_does_not_say_how_big_the_model_is_is_refused(specs):
    config = {key: value for key, value in specs["7b"].config.items() if key != "hidden_size"}
    with pytest.raises(UnsupportedModel, match="hidden_size"):
        make_plan(replace(specs["7b"], config=config), gpu(PLENTY))


# The refusal

TOO_SMALL = {
    "7b on a GPU alone": ("7b", gpu(8 * GB, cpu=0, disk=0), {}),
    "7b on a GPU with RAM": ("7b", gpu(GB, cpu=20 * GB), {}),
    "7b on a GPU with little RAM": ("7b", gpu(3 * GB, cpu=5 * GB, disk=0), {}),
    "7b on a GPU with little RAM and disk": ("7b", gpu(3 * GB, cpu=3 * GB, disk=2 * GB), {}),
    "7b on the CPU": ("7b", cpu(8 * GB, disk=0), {}),
    "7b on the CPU with a disk": ("7b", cpu(GB, disk=20 * GB), {}),
    "7b with a long context": ("7b", gpu(2 * GB, cpu=20 * GB), {"context": 32_768}),
    "7b for a thousand": ("7b", gpu(2 * GB, cpu=20 * GB), {"concurrency": 1000}),
    "7b in float32": ("7b", gpu(20 * GB, cpu=0, disk=0), {"dtype": "float32"}),
    "7b on two GPUs": ("7b", two_gpus(8 * GB, 4 * GB, cpu=0, disk=0), {}),
    "7b on two GPUs with RAM": ("7b", two_gpus(GB, GB, cpu=20 * GB), {}),
    "0.5b on a GPU": ("0.5b", gpu(GB // 2, cpu=2 * GB), {}),
    "0.5b on the CPU with a small disk": ("0.5b", cpu(GB // 4, disk=GB // 10), {"context": 1000}),
    "70b on a GPU with RAM": ("70b", gpu(16 * GB, cpu=64 * GB, disk=0), {}),
    "nothing at all": ("0.5b", gpu(0, cpu=0, disk=0), {}),
}


@pytest.fixture(scope="module", params=TOO_SMALL.values(), ids=TOO_SMALL)
def refused(request, specs):
    """(plan with another limit of the main device, the refusal, the limit that was too small)."""
    name, budget, asked = request.param

    def again(limit):
        return make_plan(specs[name], with_main(budget, limit), **asked)

    return again, refusal(specs[name], budget, **asked), budget


def test_the_smallest_budget_of_a_refusal_works_and_one_byte_less_is_refused(refused):
    again, error, budget = refused
    assert (error.device, error.have_bytes) == (budget.compute[0], budget.limits[budget.compute[0]])
    assert again(error.smallest_bytes).main_device == error.device
    with pytest.raises(BudgetExceeded) as caught:
        again(error.smallest_bytes - 1)
    assert caught.value.smallest_bytes == error.smallest_bytes
    assert caught.value.need_bytes == error.need_bytes


def test_what_a_refusal_says_is_needed_holds_everything_and_a_byte_less_does_not(refused):
    again, error, _ = refused
    assert again(error.need_bytes).offloaded_bytes == 0
    try:
        short = again(error.need_bytes - 1)
    except BudgetExceeded:
        assert error.need_bytes == error.smallest_bytes
    else:
        assert short.offloaded_bytes > 0


def test_a_refusal_says_what_else_would_help(specs):
    bare = refusal(specs["7b"], cpu(8 * GB, disk=0), dtype="float32", context=4096)
    assert "a shorter --context (each token takes 114,688 bytes)" in bare.hint
    assert "--dtype bfloat16, which halves it" in bare.hint
    assert bare.hint.endswith("a smaller model.")
    tied = refusal(specs["0.5b"], gpu(GB // 2, cpu=2 * GB))
    assert tied.hint == "Embeddings that are also the lm_head cannot be offloaded. Take a smaller model."
    assert f"{tied.smallest_bytes:,}" in str(tied)


def test_a_context_that_could_hardly_be_shorter_is_not_blamed(specs):
    assert "--context" not in refusal(specs["7b"], cpu(GB, disk=0), context=2048).hint
    assert "--context" not in refusal(specs["7b"], cpu(GB, disk=0)).hint


# Devices


def test_two_gpus_are_a_pipeline(specs):
    plan = make_plan(specs["7b"], two_gpus(9 * GB, 9 * GB, cpu=20 * GB))
    assert plan.offloaded_bytes == 0
    assert [device.device for device in plan.devices] == ["cuda:0", "cuda:1"]
    layers = [plan.device_map[f"model.layers.{i}"] for i in range(28)]
    assert layers == sorted(layers)
    assert set(layers) == {0, 1}
    assert (plan.device_map["model.embed_tokens"], plan.device_map["lm_head"]) == (0, 1)
    assert [device.kv_bytes for device in plan.devices] == [
        layers.count(number) * (plan.kv_tokens + 256) * 57_344 // 28 for number in (0, 1)
    ]
    assert [device.logits_bytes > 0 for device in plan.devices] == [False, True]


def test_two_gpus_hold_what_one_of_them_cannot(specs):
    budget = two_gpus(9 * GB, 9 * GB, cpu=0, disk=0)
    assert refusal(specs["7b"], gpu(9 * GB, cpu=0, disk=0)).smallest_bytes > 15 * GB
    assert make_plan(specs["7b"], budget).resident_bytes == make_plan(specs["7b"], budget).weights_bytes


def test_a_second_gpu_that_is_not_needed_is_left_free(specs):
    plan = make_plan(specs["0.5b"], two_gpus(9 * GB, 9 * GB, cpu=GB))
    assert plan.device_map == {"": 0}
    assert (plan.max_memory[1], plan.max_memory["cpu"]) == (0, GB)
    assert any(note.startswith("cuda:1 is not used") for note in plan.notes)


def test_a_disk_takes_what_ram_cannot(specs):
    plan = make_plan(specs["7b"], gpu(6 * GB, cpu=4 * GB, disk=9 * GB))
    assert [device.device for device in plan.devices] == ["cuda:0", "cpu", "disk"]
    assert 3 * GB < on(plan, "cpu").weights_bytes < 4 * GB
    assert on(plan, "disk").weights_bytes == plan.offloaded_bytes - on(plan, "cpu").weights_bytes > 0
    assert plan.streamed_bytes_per_token == plan.offloaded_bytes
    assert {"cpu", "disk"} < set(plan.device_map.values())


def test_a_disk_that_the_budget_does_not_name_has_no_limit_because_nothing_is_written_there(specs):
    plan = make_plan(specs["7b"], cpu(5 * GB))
    assert on(plan, "disk").budget_bytes == plan.weights_bytes
    assert on(plan, "disk").weights_bytes == plan.offloaded_bytes > 10 * GB
    assert plan.max_memory["disk"] == plan.weights_bytes


@pytest.mark.parametrize("places", [{"cpu": 4 * GB, "disk": 0}, {"cpu": 0, "disk": 0}])
def test_limits_of_places_to_offload_to_are_kept(specs, places):
    assert refusal(specs["7b"], gpu(6 * GB, **places)).smallest_bytes > 6 * GB


def test_a_70b_goes_onto_a_card_of_16_gb_with_the_rest_in_ram_and_on_disk(specs):
    plan = make_plan(specs["70b"], gpu(16 * GB, cpu=64 * GB, disk=200 * GB))
    assert plan.weights_bytes == 141_107_412_992 + 512
    assert plan.kv_bytes_per_token == 327_680
    assert 13 * GB < plan.resident_bytes < 16 * GB
    assert 62 * GB < on(plan, "cpu").weights_bytes < 64 * GB


def test_the_main_device_is_nearly_filled_before_weights_leave(specs):
    for limit in range(4 * GB, 15 * GB, GB):
        assert (
            make_plan(specs["7b"], gpu(limit, cpu=20 * GB)).devices[0].free_bytes < 136_000_000
        )  # one matrix


# The device map, against accelerate and the model itself

PLACED = {
    "7b on one GPU": ("7b", gpu(24 * GB, cpu=0)),
    "7b with RAM": ("7b", gpu(15 * GB, cpu=20 * GB)),
    "7b with RAM and disk": ("7b", gpu(3 * GB, cpu=5 * GB, disk=20 * GB)),
    "7b on two GPUs": ("7b", two_gpus(9 * GB, 9 * GB, cpu=0)),
    "7b on two GPUs with RAM": ("7b", two_gpus(5 * GB, 5 * GB, cpu=20 * GB)),
    "7b on the CPU": ("7b", cpu(20 * GB)),
    "7b on the CPU with a disk": ("7b", cpu(5 * GB, disk=20 * GB)),
    "0.5b with RAM": ("0.5b", gpu(1_200_000_000, cpu=2 * GB)),
    "0.5b on the CPU with a disk": ("0.5b", cpu(700_000_000, disk=2 * GB)),
    "0.5b on two GPUs": ("0.5b", two_gpus(1_200_000_000, 2 * GB, cpu=0)),
    "70b with RAM and disk": ("70b", gpu(40 * GB, cpu=64 * GB, disk=80 * GB)),
}


@pytest.fixture(scope="module")
def meta_models(specs):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def built(spec):
        with torch.device("meta"):
            config = AutoConfig.for_model(**spec.config)
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    return {name: built(specs[name]) for name in ("0.5b", "7b", "70b")}


def nearest(module, device_map):
    """As accelerate resolves a module: the entry of its nearest ancestor."""
    while module not in device_map:
        module = module.rpartition(".")[0] if module else pytest.fail("no entry covers it")
    return device_map[module]


def owned(model):
    """(module, tensor) of every parameter and buffer, tied ones once."""
    seen = set()
    for name, module in model.named_modules():
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor


@pytest.mark.parametrize(("name", "budget"), PLACED.values(), ids=PLACED)
def test_accelerate_accepts_the_device_map_for_the_real_model(specs, meta_models, name, budget):
    from accelerate.utils import check_device_map

    device_map = make_plan(specs[name], budget).device_map
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # accelerate warns of a key that is no module
        check_device_map(meta_models[name], device_map)
    assert not [
        (a, b) for a in device_map for b in device_map if a != b and b.startswith(f"{a}." if a else "")
    ]


@pytest.mark.parametrize(("name", "budget"), PLACED.values(), ids=PLACED)
def test_the_device_map_puts_the_planned_bytes_on_each_device(specs, meta_models, name, budget):
    plan = make_plan(specs[name], budget)
    held = {}
    for module, tensor in owned(meta_models[name]):
        place = nearest(module, plan.device_map)
        held[place] = held.get(place, 0) + tensor.nbytes
    planned = {device.device.removeprefix("cuda:"): device.weights_bytes for device in plan.devices}
    assert {str(place): n_bytes for place, n_bytes in held.items()} == planned


# Notes


@pytest.mark.parametrize(("limit", "concurrency"), [(16_600_000_000, 1), (17 * GB, 1), (20 * GB, 4)])
def test_the_longest_context_that_a_note_offers_is_exact(specs, limit, concurrency):
    plan = make_plan(specs["7b"], gpu(limit, cpu=20 * GB), concurrency=concurrency)
    (offer,) = (note for note in plan.notes if "would fit" in note)
    longest = int(re.search(r"--context (\d+)", offer)[1])
    assert plan.context < longest
    assert offer.startswith(f"{longest:,} tokens of context would fit")
    asked = make_plan(specs["7b"], gpu(limit, cpu=20 * GB), context=longest, concurrency=concurrency)
    assert (asked.offloaded_bytes, asked.chunk_tokens) == (0, plan.chunk_tokens)
    if longest < 32_768:
        more = make_plan(specs["7b"], gpu(limit, cpu=20 * GB), context=longest + 1, concurrency=concurrency)
        assert more.chunk_tokens < plan.chunk_tokens or more.offloaded_bytes


def test_no_longer_context_is_offered_to_who_asked_for_one_or_offloads(specs):
    for plan in (
        make_plan(specs["7b"], gpu(24 * GB), context=4096),
        make_plan(specs["7b"], gpu(8 * GB, cpu=20 * GB)),
    ):
        assert not any("would fit" in note for note in plan.notes)


def test_an_unlisted_family_is_planned_as_an_estimate_and_says_so(specs):
    config = {**specs["0.5b"].config, "model_type": "nonesuch"}
    known = make_plan(specs["0.5b"], gpu(4 * GB))
    plan = make_plan(replace(specs["0.5b"], config=config), gpu(4 * GB))
    assert (plan.exact, plan.family) == (False, "nonesuch")
    assert any("'nonesuch' is not in the table of families" in note for note in plan.notes)
    assert plan.weights_bytes == known.weights_bytes
    assert plan.devices[0].activation_bytes > known.devices[0].activation_bytes
    assert known.exact
    assert not any("table of families" in note for note in known.notes)


# For programs


@pytest.mark.parametrize(
    "budget", [gpu(24 * GB, cpu=0), two_gpus(5 * GB, 5 * GB, cpu=4 * GB, disk=20 * GB)], ids=["one", "four"]
)
def test_json_holds_the_whole_plan_in_json_types(specs, budget):
    plan = make_plan(specs["7b"], budget)
    found = plan.to_json()
    assert json.loads(json.dumps(found)) == found
    assert found.keys() >= {
        "weights_bytes", "resident_bytes", "offloaded_bytes", "kv_bytes_per_token", "kv_tokens", "fits",
        "device_map", "max_memory", "devices", "context", "concurrency", "chunk_tokens", "dtype", "family",
        "exact", "given_up", "notes", "batching", "kv",
    }  # fmt: skip
    assert (found["batching"], found["kv"]["block_tokens"]) == ("continuous", 256)
    assert found["kv"]["groups"] == [
        {"window": None, "layers": list(range(28)), "blocks": plan.kv_tokens // 256}
    ]
    assert found["fits"] is True
    assert found["model"] == specs["7b"].source
    assert found["device_map"] == plan.device_map
    assert found["max_memory"] == {str(device): n_bytes for device, n_bytes in plan.max_memory.items()}
    for device, planned in zip(found["devices"], plan.devices, strict=True):
        assert device["device"] == planned.device
        assert device["budget_bytes"] == planned.budget_bytes == budget.limits[planned.device]
        assert device["budget_bytes"] - device["peak_bytes"] == device["free_bytes"] >= 0
        parts = ("weights", "kv", "activation", "logits", "staging", "reserve")
        assert device["peak_bytes"] == sum(device[f"{part}_bytes"] for part in parts)


def test_the_same_question_has_the_same_answer(specs):
    budget = gpu(9 * GB, cpu=20 * GB)
    assert make_plan(specs["7b"], budget) == make_plan(specs["7b"], budget)


def test_headers_are_enough_and_no_folder_is_needed(specs):
    bare = ModelSpec("owner/name", None, specs["7b"].config, specs["7b"].tensors)
    assert (
        make_plan(bare, gpu(9 * GB, cpu=20 * GB)).device_map
        == make_plan(specs["7b"], gpu(9 * GB, cpu=20 * GB)).device_map
    )
