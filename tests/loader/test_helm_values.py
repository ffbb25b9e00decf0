"""loader/helm_values.py: a plan as the chart's values."""

import re

import pytest

from loader.budget import MemoryBudget
from loader.checkpoint import read
from loader.helm_values import (
    CUDA_HOST_BYTES,
    PROBE_PERIOD_SECONDS,
    helm_values,
    pod_memory_bytes,
    start_seconds,
)
from loader.plan import make_plan

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
