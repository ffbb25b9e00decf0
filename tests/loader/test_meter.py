"""loader/meter.py on GPUs that are not here: torch.cuda's answers are scripted, the arithmetic is real."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from loader import probe
from loader.batching import CONTINUOUS, ONE_AT_A_TIME
from loader.budget import CUDA_CONTEXT_BYTES, MemoryBudget
from loader.checkpoint import ModelSpec
from loader.errors import CudaTakesMore
from loader.kv_layout import KvGroup, KvLayout
from loader.meter import DO_NOT_SPLIT, LATER_KERNELS_BYTES, Meter
from loader.placement import CUDA_GRAPHS_BYTES
from loader.plan import DevicePlan, Plan
from loader.probe import Gpu, Machine

GB = 10**9
MB = 10**6
TOTAL = 16 * GB
LATER_BYTES = LATER_KERNELS_BYTES + CUDA_GRAPHS_BYTES  # that the driver takes after the first product
UUIDS = {"cuda:0": "aaaa", "cuda:1": "bbbb"}


def plan_for(devices, budget):
    return Plan(
        spec=ModelSpec("m", None, {}, ()), budget=budget, family="f", exact=True, dtype="bfloat16",
        weights_bytes=1, resident_bytes=1, offloaded_bytes=0, kv_bytes_per_token=1, context=1,
        concurrency=1, chunk_tokens=1, batching=CONTINUOUS, kv=KvLayout(256, (KvGroup(None, (0,), 1),)),
        device_map={"": 0}, max_memory={},
        devices=tuple(DevicePlan(name, 8 * GB, 1, 0, 0, 0, 0, 0) for name in devices),
    )  # fmt: skip


def with_budget(plan, budget_bytes):
    return replace(plan, devices=tuple(replace(d, budget_bytes=budget_bytes) for d in plan.devices))


@pytest.fixture
def cards(monkeypatch):
    """Two cards of 16 GB; each context takes 500 MB, and the allocator holds 2 MB after the first product."""
    fractions = {}
    cuda = SimpleNamespace(free={"cuda:0": 15 * GB, "cuda:1": 12 * GB}, reserved=2 * MB, fractions=fractions)
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, dtype, device: real(*shape, dtype=dtype))
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (cuda.free[device] - 500 * MB - cuda.reserved, TOTAL)
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=UUIDS[d]))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: cuda.reserved)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: 7 * GB)
    monkeypatch.setattr(
        torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.update({device: share})
    )
    return cuda


def nvml(monkeypatch, *order):
    """What NVML saw before any context: the cards in its own order."""
    free = {"cuda:0": 15 * GB, "cuda:1": 12 * GB}
    gpus = tuple(
        Gpu(f"cuda:{number}", "card", f"GPU-{UUIDS[name]}", TOTAL, free[name])
        for number, name in enumerate(order)
    )
    monkeypatch.setattr(probe, "machine", lambda: Machine(32 * GB, 30 * GB, gpus))


def budget(*devices, **more):
    return MemoryBudget(devices, dict.fromkeys(devices, 8 * GB) | more)


def test_the_allocator_is_capped_at_the_budget_less_the_measured_context_and_later_kernels(
    cards, monkeypatch
):
    nvml(monkeypatch, "cuda:0")
    meter = Meter(plan_for(["cuda:0"], budget("cuda:0")))
    assert cards.fractions["cuda:0"] * TOTAL == pytest.approx(8 * GB - 500 * MB - LATER_BYTES)
    assert meter.peak_bytes() == {"cuda:0": 500 * MB + 7 * GB}


def test_cards_that_nvml_numbers_otherwise_are_not_mixed_up(cards, monkeypatch):
    nvml(monkeypatch, "cuda:1", "cuda:0")
    Meter(plan_for(["cuda:0", "cuda:1"], budget("cuda:0", "cuda:1")))
    for device, later_bytes in (("cuda:0", LATER_BYTES), ("cuda:1", LATER_KERNELS_BYTES)):
        assert cards.fractions[device] * TOTAL == pytest.approx(8 * GB - 500 * MB - later_bytes)


def test_without_nvml_the_context_counts_as_much_as_was_planned_for_it(cards, monkeypatch):
    nvml(monkeypatch)
    Meter(plan_for(["cuda:0"], budget("cuda:0")))
    assert cards.fractions["cuda:0"] * TOTAL == pytest.approx(8 * GB - CUDA_CONTEXT_BYTES - CUDA_GRAPHS_BYTES)


def test_a_context_that_was_there_before_counts_as_much_as_was_planned_for_it(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    meter = Meter(plan_for(["cuda:0"], budget("cuda:0")))
    assert meter.peak_bytes() == {"cuda:0": CUDA_CONTEXT_BYTES - LATER_KERNELS_BYTES + 7 * GB}


def test_what_does_not_fit_beside_the_context_is_refused_before_weights_are_read(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    plan = plan_for(["cuda:0"], budget("cuda:0"))  # whose model needs 1 byte
    meter = Meter(plan)
    meter.refuse_what_cannot_fit(with_budget(plan, 1 + 500 * MB + LATER_BYTES))
    with pytest.raises(CudaTakesMore, match="takes 500,000,000 bytes of this card") as refused:
        meter.refuse_what_cannot_fit(with_budget(plan, 500 * MB + LATER_BYTES))
    assert refused.value.exit_code == 43


@pytest.mark.parametrize(
    ("offloaded_bytes", "own", "wanted"),
    [(5 * GB, {}, [DO_NOT_SPLIT, ""]), (0, {}, []), (5 * GB, {"PYTORCH_ALLOC_CONF": "x"}, [])],
)
def test_large_blocks_are_kept_whole_where_weights_are_copied_in_unless_the_user_decides(
    cards, monkeypatch, offloaded_bytes, own, wanted
):
    settings = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    Meter(replace(plan_for(["cuda:0"], budget("cuda:0")), offloaded_bytes=offloaded_bytes)).close()
    assert settings == wanted


def test_a_model_whose_weights_are_copied_in_has_no_graphs_to_spare_room_for(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda settings: None)
    Meter(replace(plan_for(["cuda:0"], budget("cuda:0")), offloaded_bytes=5 * GB))
    assert cards.fractions["cuda:0"] * TOTAL == pytest.approx(8 * GB - 500 * MB - LATER_KERNELS_BYTES)


def test_what_the_driver_takes_later_is_counted_when_it_is_asked_for(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    meter = Meter(plan_for(["cuda:0"], budget("cuda:0")))
    cards.free["cuda:0"] -= 90 * MB
    assert meter.peak_bytes() == {"cuda:0": 500 * MB + 7 * GB}
    meter.recount()
    assert meter.peak_bytes() == {"cuda:0": 590 * MB + 7 * GB}
    cards.free["cuda:0"] += 60 * MB  # somebody else's
    meter.recount()
    assert meter.peak_bytes() == {"cuda:0": 590 * MB + 7 * GB}


def test_what_others_take_of_the_card_meanwhile_never_passes_the_budget(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    meter = Meter(plan_for(["cuda:0"], budget("cuda:0")))
    cap_bytes = cards.fractions["cuda:0"] * TOTAL
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _device: round(cap_bytes))
    cards.free["cuda:0"] -= 2 * GB
    for _ in range(2):
        meter.recount()
        assert meter.peak_bytes()["cuda:0"] == pytest.approx(8 * GB, abs=1)


@pytest.mark.parametrize(("device", "batching"), [("cuda:1", CONTINUOUS), ("cuda:0", ONE_AT_A_TIME)])
def test_where_no_graphs_can_be_no_room_is_spared_for_them(cards, monkeypatch, device, batching):
    nvml(monkeypatch, "cuda:0", "cuda:1")
    Meter(replace(plan_for(["cuda:0", "cuda:1"], budget("cuda:0", "cuda:1")), batching=batching))
    assert cards.fractions[device] * TOTAL == pytest.approx(8 * GB - 500 * MB - LATER_KERNELS_BYTES)


def test_where_nothing_is_known_of_before_there_is_nothing_to_count_again(cards, monkeypatch):
    nvml(monkeypatch)
    meter = Meter(plan_for(["cuda:0"], budget("cuda:0")))
    before = meter.peak_bytes()
    meter.recount()
    assert meter.peak_bytes() == before


def test_closing_takes_the_cap_off(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    Meter(plan_for(["cuda:0"], budget("cuda:0"))).close()
    assert cards.fractions == {"cuda:0": 1}


def test_a_budget_smaller_than_the_context_leaves_nothing_and_no_negative_share(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    Meter(plan_for(["cuda:0"], MemoryBudget(("cuda:0",), {"cuda:0": 100 * MB})))
    assert cards.fractions["cuda:0"] == 0


def test_ram_beside_a_gpu_is_measured_too_and_the_disk_is_not(cards, monkeypatch):
    nvml(monkeypatch, "cuda:0")
    meter = Meter(plan_for(["cuda:0", "cpu", "disk"], budget("cuda:0", cpu=8 * GB)))
    held = bytearray(64 * MB)
    assert meter.peak_bytes().keys() == {"cuda:0", "cpu"}
    assert meter.peak_bytes()["cpu"] >= len(held)


def test_where_the_peak_cannot_be_started_again_only_what_is_above_it_counts(monkeypatch):
    monkeypatch.setattr(probe, "reset_peak", lambda: False)
    meter = Meter(plan_for(["cpu"], MemoryBudget(("cpu",), {"cpu": GB})))
    assert meter.baseline_bytes == pytest.approx(probe.peak_resident_bytes(), rel=0.05)
    assert meter.peak_bytes()["cpu"] < 100 * MB
