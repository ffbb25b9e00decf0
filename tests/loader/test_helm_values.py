"""loader/helm_values.py: a plan as the chart's values."""

import re
from dataclasses import replace

import pytest

from loader.budget import MemoryBudget
from loader.checkpoint import read
from loader.errors import BudgetExceeded
from loader.helm_values import (
    CUDA_HOST_BYTES,
    DOWNLOAD_BYTES_PER_SECOND,
    PROBE_PERIOD_SECONDS,
    helm_values,
    pod_memory_bytes,
    start_seconds,
)
from loader.plan import make_plan
from loader.probe import Gpu, Machine

GB = 10**9
MIB = 2**20
BUDGETS = {
    "on the CPU": MemoryBudget(("cpu",), {"cpu": 20 * GB}),
    "on the CPU with the rest on disk": MemoryBudget(("cpu",), {"cpu": 8 * GB, "disk": 20 * GB}),
    "on a GPU": MemoryBudget(("cuda:0",), {"cuda:0": 20 * GB, "cpu": 20 * GB}),
    "on a GPU with the rest in RAM": MemoryBudget(("cuda:0",), {"cuda:0": 8 * GB, "cpu": 20 * GB}),
    "on two GPUs": MemoryBudget(("cuda:0", "cuda:1"), {"cuda:0": 9 * GB, "cuda:1": 9 * GB, "cpu": 20 * GB}),
}


@pytest.fixture(scope="module")
def spec(tmp_path_factory, fake_checkpoint, configs):
    return read(fake_checkpoint(tmp_path_factory.mktemp("7b"), configs["qwen2-7b"]))


@pytest.fixture(params=BUDGETS.values(), ids=BUDGETS)
def plan(spec, request):
    return make_plan(spec, request.param)


def host_bytes(plan):
    return sum(device.peak_bytes for device in plan.devices if device.device == "cpu")


def test_memory_is_asked_for_and_limited_alike_in_whole_mebibytes(plan):
    resources = helm_values(plan)["resources"]
    assert resources["requests"] == resources["limits"]
    quantity = re.fullmatch(r"(\d+)Mi", resources["limits"]["memory"])
    assert int(quantity[1]) * MIB == pod_memory_bytes(plan)


def test_a_pod_has_room_for_the_process_before_loading_and_for_what_the_plan_puts_into_ram(plan):
    assert pod_memory_bytes(plan) > plan.startup_bytes + host_bytes(plan)
    assert (
        pod_memory_bytes(plan) < 1.2 * (plan.startup_bytes + host_bytes(plan) + CUDA_HOST_BYTES) + 512 * MIB
    )


def test_a_pod_asks_for_the_gpus_that_compute(spec):
    cards = {}
    for name, budget in BUDGETS.items():
        resources = helm_values(make_plan(spec, budget))["resources"]
        cards[name] = resources["limits"].get("nvidia.com/gpu")
    assert cards == {
        "on the CPU": None, "on the CPU with the rest on disk": None, "on a GPU": 1,
        "on a GPU with the rest in RAM": 1, "on two GPUs": 2,
    }  # fmt: skip


@pytest.mark.parametrize("numbers", [(1,), (1, 3)])
def test_a_pod_counts_its_gpus_from_0_whichever_they_were_where_it_was_planned(spec, numbers):
    limits = {f"cuda:{number}": 9 * GB + number for number in numbers}
    plan = make_plan(spec, MemoryBudget(tuple(limits), {**limits, "cpu": 20 * GB}))
    there = planned_by_a_pod(plan, Machine(ram_total_bytes=64 * GB, ram_free_bytes=64 * GB))
    anew = {number: place for place, number in enumerate(numbers)}
    assert helm_values(plan)["resources"]["limits"]["nvidia.com/gpu"] == len(numbers)
    assert there.budget.compute == tuple(f"cuda:{anew[number]}" for number in numbers)
    assert [there.budget.limits[device] for device in there.budget.compute] == list(limits.values())
    assert there.device_map == {part: anew.get(place, place) for part, place in plan.device_map.items()}


def test_weights_that_wait_in_ram_are_the_pods_and_those_on_the_gpu_are_not(spec):
    gpu, spilled = (make_plan(spec, BUDGETS[name]) for name in ("on a GPU", "on a GPU with the rest in RAM"))
    assert pod_memory_bytes(gpu) < 4 * GB < spec.file_bytes
    assert pod_memory_bytes(spilled) - pod_memory_bytes(gpu) >= spilled.offloaded_bytes


def test_cudas_libraries_have_their_share_of_host_memory(spec):
    gpu = make_plan(spec, BUDGETS["on a GPU"])
    assert host_bytes(gpu) == 0
    assert pod_memory_bytes(gpu) > gpu.startup_bytes + CUDA_HOST_BYTES


def test_the_probe_waits_as_long_as_the_slowest_start(plan):
    probe = helm_values(plan)["startupProbe"]
    waits = probe["periodSeconds"] * probe["failureThreshold"]
    assert start_seconds(plan) <= waits < start_seconds(plan) + PROBE_PERIOD_SECONDS
    assert start_seconds(plan) >= 60 + plan.spec.file_bytes / 200_000_000


def rehearsal_seconds(plan, gpu):
    """What the start takes more than on a GPU, where nothing is counted for it."""
    return start_seconds(plan) - start_seconds(gpu)


def test_the_largest_steps_take_their_time_on_a_cpu(spec):
    """2 chunks of 2048 tokens through one of 28 layers, or through all where some are on disk."""
    cpu, spilled, gpu = (
        make_plan(spec, BUDGETS[name])
        for name in ("on the CPU", "on the CPU with the rest on disk", "on a GPU")
    )
    chunk_s = 2 * 7.6e9 * 2 / 20e9
    assert rehearsal_seconds(cpu, gpu) == pytest.approx(chunk_s * cpu.chunk_tokens / 28, rel=0.05)
    assert rehearsal_seconds(spilled, gpu) == pytest.approx(chunk_s * spilled.chunk_tokens, rel=0.05)


def test_a_model_of_the_hub_is_given_time_and_room_to_come(plan):
    remote = replace(plan, spec=replace(plan.spec, revision="main"))
    longer = start_seconds(remote) - start_seconds(plan)
    assert longer == pytest.approx(plan.spec.file_bytes / DOWNLOAD_BYTES_PER_SECOND, abs=1)
    assert "ephemeral-storage" not in helm_values(plan)["resources"]["requests"]
    room = helm_values(remote)["resources"]["requests"]["ephemeral-storage"]
    assert int(room.removesuffix("Gi")) * 2**30 >= 1.1 * plan.spec.file_bytes


def test_a_claim_that_is_there_is_not_given_another_size(plan):
    """It cannot shrink, and `helm upgrade` with another model's plan would fail."""
    assert set(helm_values(plan)) == {"config", "resources", "startupProbe"}


def planned_by_a_pod(plan, pod):
    config = helm_values(plan)["config"]
    budget = MemoryBudget.parse(None, config["max_memory"], "auto", pod)
    return make_plan(plan.spec, budget, config["context"], config["concurrency"], config["dtype"])


@pytest.mark.parametrize("ram_bytes", [2 * GB, 200 * GB])
def test_with_the_settings_among_the_values_a_pod_makes_the_same_plan(plan, ram_bytes):
    """Whatever it finds free itself."""
    same = planned_by_a_pod(plan, Machine(ram_total_bytes=ram_bytes, ram_free_bytes=ram_bytes))
    assert (same.device_map, same.kv, same.chunk_tokens) == (plan.device_map, plan.kv, plan.chunk_tokens)
    assert [device.peak_bytes for device in same.devices] == [device.peak_bytes for device in plan.devices]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_pod_holds_weights_in_what_they_were_planned_in(spec, dtype):
    plan = make_plan(spec, MemoryBudget(("cpu",), {"cpu": 60 * GB}), dtype=dtype)
    same = planned_by_a_pod(plan, Machine(ram_total_bytes=64 * GB, ram_free_bytes=64 * GB))
    assert (same.dtype, same.weights_bytes, same.kv) == (dtype, plan.weights_bytes, plan.kv)


def on_a_card(card_bytes, ram_bytes=20 * GB):
    return MemoryBudget(("cuda:0",), {"cuda:0": card_bytes, "cpu": ram_bytes})


def test_two_runs_print_the_same_however_much_ram_is_free_meanwhile(spec):
    one, two = (helm_values(make_plan(spec, on_a_card(20 * GB, ram))) for ram in (9 * GB, 10 * GB))
    assert one == two
    assert one["config"]["max_memory"] == f"0={20 * GB},cpu=0"


LARGE_CARD = Machine(200 * GB, 200 * GB, (Gpu("cuda:0", "large", "GPU-1", 80 * GB, 80 * GB, 132),))


def test_what_a_larger_card_takes_for_cuda_comes_from_the_pool(spec):
    """A card that cannot be asked is taken for one of 30 multiprocessors."""
    plan = make_plan(spec, on_a_card(20 * GB))
    there = planned_by_a_pod(plan, LARGE_CARD)
    assert there.budget.context_bytes - plan.budget.context_bytes > 300_000_000
    assert plan.kv_tokens - 10_000 < there.kv_tokens < plan.kv_tokens
    assert (there.device_map, there.context) == (plan.device_map, plan.context)


def test_and_never_from_the_pods_ram_which_has_no_room_for_weights(spec):
    with pytest.raises(BudgetExceeded) as misfit:
        make_plan(spec, on_a_card(GB, ram_bytes=0))
    tight = make_plan(spec, on_a_card(misfit.value.need_bytes))
    assert not tight.offloaded_bytes
    with pytest.raises(BudgetExceeded):
        planned_by_a_pod(tight, LARGE_CARD)


def test_a_larger_model_is_given_longer_to_start(tmp_path, fake_checkpoint, configs, spec):
    budget = MemoryBudget(("cuda:0",), {"cuda:0": 200 * GB, "cpu": 0})
    large = read(fake_checkpoint(tmp_path, configs["llama3-70b"]))
    assert start_seconds(make_plan(large, budget)) > 9 * (start_seconds(make_plan(spec, budget)) - 60)


def test_values_are_plain_mappings_of_text_and_numbers(plan):
    def leaves(value):
        return (
            [leaf for inner in value.values() for leaf in leaves(inner)] if type(value) is dict else [value]
        )

    assert {type(leaf) for leaf in leaves(helm_values(plan))} <= {str, int}
