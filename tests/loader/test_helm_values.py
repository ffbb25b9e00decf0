"""loader/helm_values.py: a plan as the chart's values."""

import re
from dataclasses import replace

import pytest

from loader.budget import MemoryBudget
from loader.checkpoint import read
from loader.helm_values import (
    CUDA_HOST_BYTES,
    DOWNLOAD_BYTES_PER_SECOND,
    PROBE_PERIOD_SECONDS,
    helm_values,
    pod_memory_bytes,
    start_seconds,
)
from loader.plan import make_plan
from loader.probe import Machine

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


def test_the_volume_has_room_for_the_model_and_its_successor(plan):
    size = int(helm_values(plan)["persistence"]["size"].removesuffix("Gi")) * 2**30
    assert 2.2 * plan.spec.file_bytes <= size < 2.2 * plan.spec.file_bytes + 2**30


def test_with_the_settings_among_the_values_a_pod_makes_the_same_plan(spec, plan):
    """Whatever it finds free itself."""
    config = helm_values(plan)["config"]
    pod = Machine(ram_total_bytes=3 * GB, ram_free_bytes=2 * GB)
    budget = MemoryBudget.parse(None, config["max_memory"], "auto", pod)
    same = make_plan(spec, budget, config["context"], config["concurrency"])
    assert (same.device_map, same.kv, same.chunk_tokens) == (plan.device_map, plan.kv, plan.chunk_tokens)
    assert [device.peak_bytes for device in same.devices] == [device.peak_bytes for device in plan.devices]


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
