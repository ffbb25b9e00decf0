"""loader/placement.py: units on devices for one chunk size and context."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader.budget import MemoryBudget
from loader.checkpoint import read
from loader.footprint import measure
from loader.placement import (
    CPU_RESERVE_BYTES,
    CUDA_GRAPHS_BYTES,
    CUDA_SLACK_BYTES,
    Placer,
    Setting,
    gpu_reserve,
)

GB = 10**9
PLENTY = 10**15
SETTING = Setting(chunk=256, context=2048, concurrency=1)
HALF = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
HALF |= {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}
WINDOWED = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 14}


@pytest.fixture(scope="module")
def models(tmp_path_factory, fake_checkpoint, configs):
    """Footprints of Qwen2.5-7B, of it with a window in its upper half, and of a tied model of 0.5B."""
    big = configs["qwen2-7b"]
    variants = {"7b": big, "7b windowed": big | WINDOWED, "0.5b tied": big | HALF}
    folder = tmp_path_factory.mktemp("models")
    return {name: measure(read(fake_checkpoint(folder / name, config))) for name, config in variants.items()}


def gpu(limit, **places):
    return MemoryBudget(("cuda:0",), {"cuda:0": limit, **places})


def cpu(limit, **places):
    return MemoryBudget(("cpu",), {"cpu": limit, **places})


def two_gpus(first, second, **places):
    return MemoryBudget(("cuda:0", "cuda:1"), {"cuda:0": first, "cuda:1": second, **places})


def resident(footprint, budget, setting=SETTING):
    return Placer(footprint, budget).resident(setting, budget.limits[budget.compute[0]])


def offloaded(footprint, budget, setting=SETTING):
    return Placer(footprint, budget).offloaded(setting, budget.limits[budget.compute[0]])


def needed(footprint, budget, setting=SETTING):
    """Bytes of the main device that hold everything."""
    return Placer(footprint, budget).resident(setting, PLENTY).devices[0].peak_bytes


def by_device(placement):
    return {plan.device: plan for plan in placement.devices}


def placed_bytes(footprint, placement, device):
    return sum(unit.n_bytes for unit in footprint.units if placement.places[unit.module] == device)


def assert_adds_up(footprint, placement, budget, continuous=True):
    """Every unit is somewhere, once; nothing is over its limit; caches and logits are where they are used."""
    devices = by_device(placement)
    assert list(placement.places) == [unit.module for unit in footprint.units]
    for device, plan in devices.items():
        assert plan.weights_bytes == placed_bytes(footprint, placement, device)
        assert 0 <= plan.peak_bytes <= plan.budget_bytes == budget.limits[device]
        assert plan.free_bytes == plan.budget_bytes - plan.peak_bytes
    assert sum(plan.weights_bytes for plan in devices.values()) == footprint.weights_bytes
    setting = placement.setting
    pool = Placer(footprint, budget, continuous).pool
    assert sum(plan.kv_bytes for plan in devices.values()) == pool.n_bytes(setting)
    logits = sum(plan.logits_bytes for plan in devices.values())
    assert logits == footprint.logits_bytes(setting.concurrency)
    away = [plan for device, plan in devices.items() if device not in budget.compute]
    assert placement.offload.n_bytes == sum(plan.weights_bytes for plan in away)
    assert devices[budget.compute[0]].staging_bytes == placement.offload.staging_bytes


# Everything on the devices that compute


@pytest.mark.parametrize(("device", "on_gpu"), [("cuda:0", True), ("cpu", False)])
def test_one_device_holds_weights_cache_activations_logits_and_a_reserve(models, device, on_gpu):
    footprint = models["7b"]
    budget = MemoryBudget((device,), {device: PLENTY})
    placement = resident(footprint, budget, Setting(2048, 8192, 1))
    assert_adds_up(footprint, placement, budget)
    (plan,) = placement.devices
    block = 256 if on_gpu else 32
    activations = footprint.packed_activation_bytes(2048, 8192, 1, block, on_gpu)
    assert (plan.weights_bytes, plan.kv_bytes) == (footprint.weights_bytes, (8192 + block) * 57_344)
    assert (plan.activation_bytes, plan.staging_bytes) == (activations, 0)
    assert plan.logits_bytes == 152_064 * (2 + 6 * 4) + 3584 * 2
    graphs = CUDA_GRAPHS_BYTES + footprint.graph_bytes(1, 8192, block)
    assert plan.reserve_bytes == (
        gpu_reserve(activations, budget.context_bytes) + graphs if on_gpu else CPU_RESERVE_BYTES
    )


@pytest.mark.parametrize(("device", "on_gpu"), [("cuda:0", True), ("cpu", False)])
def test_a_model_that_runs_one_request_at_a_time_has_its_own_cache_and_no_graphs(models, device, on_gpu):
    footprint = models["7b windowed"]
    budget = MemoryBudget((device,), {device: PLENTY})
    placement = Placer(footprint, budget, continuous=False).resident(Setting(2048, 8192, 1), PLENTY)
    assert_adds_up(footprint, placement, budget, continuous=False)
    (plan,) = placement.devices
    activations = footprint.activation_bytes(2048, 8192, on_gpu)
    assert (plan.kv_bytes, plan.activation_bytes) == (footprint.kv_bytes(8192, 2048), activations)
    assert plan.reserve_bytes == (
        gpu_reserve(activations, budget.context_bytes) if on_gpu else CPU_RESERVE_BYTES
    )


def test_a_gpus_reserve_is_the_cuda_context_and_the_allocators_slack():
    assert gpu_reserve(0, 700 * 10**6) == 700 * 10**6 + CUDA_SLACK_BYTES
    assert gpu_reserve(200 * 2**20, GB) - gpu_reserve(0, GB) == 10 * 2**20


@pytest.mark.parametrize("name", ["7b", "7b windowed", "0.5b tied"])
@pytest.mark.parametrize("kind", [gpu, cpu])
def test_what_fits_exactly_fits_and_a_byte_less_does_not(models, name, kind):
    footprint = models[name]
    limit = needed(footprint, kind(PLENTY))
    assert resident(footprint, kind(limit)).devices[0].free_bytes == 0
    assert resident(footprint, kind(limit - 1)) is None


def test_all_requests_share_the_blocks_that_the_setting_says(models):
    least, more = (
        resident(models["7b"], cpu(PLENTY), Setting(256, 2048, 4, blocks)).devices[0]
        for blocks in (None, 100)
    )
    assert least.kv_bytes == (2048 + 32) * 57_344
    assert more.kv_bytes == 101 * 32 * 57_344
    assert more.peak_bytes - least.peak_bytes == more.kv_bytes - least.kv_bytes


def test_layers_with_a_window_keep_the_window_and_a_chunk(models):
    plan = resident(models["7b windowed"], cpu(PLENTY), Setting(256, 8192, 1)).devices[0]
    per_layer = 57_344 // 28
    kept = 511 + 256 + 1 + 32  # in 25 blocks, because they begin and end anywhere
    assert plan.kv_bytes == 14 * per_layer * (8192 + 32) + 14 * per_layer * (kept + 32)


# Several GPUs


def test_layers_fill_gpus_in_the_order_in_which_they_run(models):
    footprint, budget = models["7b"], two_gpus(9 * GB, 9 * GB)
    placement = resident(footprint, budget)
    assert_adds_up(footprint, placement, budget)
    ran = [placement.places[unit.module] for unit in footprint.units]
    assert ran == sorted(ran)
    assert set(ran) == {"cuda:0", "cuda:1"}
    assert placement.places["lm_head"] == "cuda:1"
    assert [plan.logits_bytes > 0 for plan in placement.devices] == [False, True]
    layers = {unit.layer: placement.places[unit.module] for unit in footprint.units if unit.layer is not None}
    on_first = sum(device == "cuda:0" for device in layers.values())
    assert by_device(placement)["cuda:0"].kv_bytes == on_first * (2048 + 256) * 57_344 // 28


def test_the_first_gpu_takes_as_many_layers_as_it_can(models):
    footprint, budget = models["7b"], two_gpus(9 * GB, 9 * GB)
    placement = resident(footprint, budget)
    layer = sum(unit.n_bytes for unit in footprint.units if unit.layer == 0) + 2304 * 57_344 // 28
    assert placement.devices[0].free_bytes < layer


def test_no_layer_is_split_between_gpus(models):
    footprint = models["7b"]
    placement = resident(footprint, two_gpus(9 * GB, 9 * GB))
    homes = {
        (unit.layer, placement.places[unit.module]) for unit in footprint.units if unit.layer is not None
    }
    assert len(homes) == 28


def test_a_layer_goes_where_its_cache_fits_too(models):
    footprint = models["7b"]
    setting = Setting(256, 32_768, 4, blocks=512)  # keys and values are half as large as the weights
    for first in range(10 * GB, 14 * GB, GB // 5):
        budget = two_gpus(first, 16 * GB)
        assert_adds_up(footprint, resident(footprint, budget, setting), budget)
        assert_adds_up(footprint, offloaded(footprint, budget, setting), budget)


def test_the_last_gpu_holds_what_is_left_to_the_byte(models):
    footprint = models["7b"]
    left = resident(footprint, two_gpus(9 * GB, PLENTY)).devices[1].peak_bytes
    assert resident(footprint, two_gpus(9 * GB, left)).devices[1].free_bytes == 0
    assert resident(footprint, two_gpus(9 * GB, left - 1)) is None


def test_a_gpu_that_is_not_needed_is_not_used(models):
    placement = resident(models["0.5b tied"], two_gpus(9 * GB, 9 * GB))
    assert set(by_device(placement)) == {"cuda:0"}


def test_a_tied_head_computes_where_the_embedding_is(models):
    footprint, budget = models["0.5b tied"], two_gpus(1_400_000_000, 9 * GB)
    placement = resident(footprint, budget)
    assert_adds_up(footprint, placement, budget)
    assert set(by_device(placement)) == {"cuda:0", "cuda:1"}
    assert placement.places["model.embed_tokens"] == placement.places["lm_head"] == "cuda:0"
    assert [plan.logits_bytes > 0 for plan in placement.devices] == [True, False]


def test_gpus_of_which_none_holds_the_rest_are_not_enough(models):
    assert resident(models["7b"], two_gpus(9 * GB, 2 * GB)) is None
    assert resident(models["7b"], two_gpus(GB, 99 * GB)) is None  # the embedding is on the first


# Offloading


def test_what_does_not_fit_on_a_gpu_waits_in_ram(models):
    footprint, budget = models["7b"], gpu(10 * GB, cpu=20 * GB, disk=0)
    placement = offloaded(footprint, budget)
    assert_adds_up(footprint, placement, budget)
    devices = by_device(placement)
    assert set(devices) == {"cuda:0", "cpu"}
    assert (devices["cpu"].kv_bytes, devices["cpu"].reserve_bytes) == (0, CPU_RESERVE_BYTES)
    assert devices["cuda:0"].kv_bytes == footprint.kv_bytes(2048 + 256, 256)
    left = {unit.module for unit in footprint.units if placement.places[unit.module] == "cpu"}
    assert left == {unit.module for unit in placement.offload.units}


def test_ram_takes_what_was_given_up_first_and_disk_the_rest(models):
    footprint, budget = models["7b"], gpu(6 * GB, cpu=4 * GB, disk=20 * GB)
    placement = offloaded(footprint, budget)
    assert_adds_up(footprint, placement, budget)
    order = [placement.places[unit.module] for unit in placement.offload.units]
    assert set(order) == {"cpu", "disk"}
    matrices = [
        place for unit, place in zip(placement.offload.units, order, strict=True) if unit.kind == "mlp"
    ]
    assert matrices == sorted(matrices)  # "cpu" before "disk"
    # What is read from disk passes through RAM on its way.
    largest = max(unit.n_bytes for unit in footprint.units if placement.places[unit.module] == "disk")
    assert by_device(placement)["cpu"].staging_bytes == largest
    assert by_device(placement)["disk"].peak_bytes == by_device(placement)["disk"].weights_bytes


def test_a_cpu_that_computes_has_only_the_disk_to_offload_to(models):
    footprint, budget = models["7b"], cpu(8 * GB, disk=20 * GB)
    placement = offloaded(footprint, budget)
    assert_adds_up(footprint, placement, budget)
    assert set(by_device(placement)) == {"cpu", "disk"}
    assert by_device(placement)["cpu"].weights_bytes < 8 * GB < footprint.weights_bytes


def test_ram_is_used_to_the_last_byte_before_the_disk_is_touched(models):
    footprint = models["7b"]
    moved = offloaded(footprint, gpu(10 * GB, cpu=PLENTY, disk=0)).offload.n_bytes
    enough = moved + CPU_RESERVE_BYTES
    assert offloaded(footprint, gpu(10 * GB, cpu=enough, disk=0)).offload.n_bytes == moved
    assert offloaded(footprint, gpu(10 * GB, cpu=enough - 1, disk=0)) is None
    spilled = offloaded(footprint, gpu(10 * GB, cpu=enough - 1, disk=20 * GB))
    assert "disk" in by_device(spilled)


def test_a_disk_limit_counts_to_the_byte(models):
    footprint = models["7b"]
    moved = offloaded(footprint, cpu(8 * GB, disk=PLENTY)).offload.n_bytes
    assert offloaded(footprint, cpu(8 * GB, disk=moved)).offload.n_bytes == moved
    assert offloaded(footprint, cpu(8 * GB, disk=moved - 1)) is None


def test_a_disk_without_a_limit_takes_whatever_is_left(models):
    footprint = models["7b"]
    moved = offloaded(footprint, cpu(8 * GB, disk=PLENTY)).offload.n_bytes
    plan = by_device(offloaded(footprint, cpu(8 * GB)))["disk"]
    assert (plan.weights_bytes, plan.budget_bytes) == (moved, footprint.weights_bytes)


@pytest.mark.parametrize(
    "places", [{"cpu": 0, "disk": 0}, {"cpu": CPU_RESERVE_BYTES, "disk": 0}, {"disk": 0}]
)
def test_without_a_place_for_them_weights_cannot_leave(models, places):
    assert offloaded(models["7b"], gpu(10 * GB, **places)) is None
    assert offloaded(models["7b"], cpu(10 * GB, disk=0)) is None


def test_a_disk_alone_does_not_serve_a_gpu_because_its_weights_pass_through_ram(models):
    assert offloaded(models["7b"], gpu(10 * GB, cpu=0, disk=PLENTY)) is None
    staging = 3584 * 18_944 * 2
    passing = offloaded(models["7b"], gpu(10 * GB, cpu=CPU_RESERVE_BYTES + staging, disk=PLENTY))
    assert by_device(passing)["cpu"].weights_bytes == 0


def test_behind_a_full_first_gpu_the_others_take_the_last_layers(models):
    footprint, budget = models["7b"], two_gpus(5 * GB, 5 * GB, cpu=30 * GB)
    placement = offloaded(footprint, budget)
    assert_adds_up(footprint, placement, budget)
    on_second = [unit for unit in footprint.units if placement.places[unit.module] == "cuda:1"]
    assert footprint.units[-len(on_second) :] == tuple(on_second)
    assert not any(unit in placement.offload.units for unit in on_second)
    assert by_device(placement)["cuda:1"].staging_bytes == 0


def test_offloading_with_room_for_everything_moves_nothing(models):
    placement = offloaded(models["7b"], gpu(PLENTY, cpu=20 * GB))
    assert placement.offload.units == ()
    assert set(by_device(placement)) == {"cuda:0"}


def test_a_device_too_small_for_what_must_stay_holds_nothing(models):
    assert offloaded(models["0.5b tied"], gpu(GB // 2, cpu=PLENTY, disk=PLENTY)) is None
    assert offloaded(models["0.5b tied"], gpu(0, cpu=PLENTY, disk=PLENTY)) is None


# Rules, for any limits

LIMITS = st.integers(0, 3 * GB)
SETTINGS = st.builds(
    Setting,
    st.sampled_from([64, 256, 2048]),
    st.sampled_from([2048, 32_768]),
    st.integers(1, 3),
    st.none() | st.integers(1024, 3072),
)


@settings(deadline=None, max_examples=60)
@given(first=LIMITS, second=LIMITS, ram=LIMITS, disk=LIMITS, setting=SETTINGS, kind=st.integers(0, 2))
def test_any_placement_adds_up_and_keeps_every_limit(models, first, second, ram, disk, setting, kind):
    budget = (
        gpu(first, cpu=ram, disk=disk),
        cpu(first, disk=disk),
        two_gpus(first, second, cpu=ram, disk=disk),
    )[kind]
    footprint = models["0.5b tied"]
    for placement in (resident(footprint, budget, setting), offloaded(footprint, budget, setting)):
        if placement is not None:
            assert_adds_up(footprint, placement, budget)


@settings(deadline=None, max_examples=40)
@given(first=LIMITS, more=st.integers(1, GB), second=LIMITS, ram=LIMITS, disk=LIMITS, setting=SETTINGS)
def test_what_can_be_placed_can_be_placed_with_a_larger_limit(
    models, first, more, second, ram, disk, setting
):
    placer = Placer(models["0.5b tied"], two_gpus(first, second, cpu=ram, disk=disk))
    for place in (placer.resident, placer.offloaded):
        if place(setting, first) is not None:
            assert place(setting, first + more) is not None
