"""What goes where: a pure function from a model's footprint and a budget to a Plan. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from loader.budget import MemoryBudget
from loader.checkpoint import ModelSpec


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What fills one device's budget, all in bytes."""

    device: str  # "cuda:0" | "cpu" | "disk"
    budget_bytes: int
    weights_bytes: int  # resident
    kv_bytes: int
    activation_bytes: int
    logits_bytes: int
    staging_bytes: int  # what offload hooks hold while an offloaded module runs
    reserve_bytes: int  # CUDA context and allocator slack, or the CPU allocator's

    @property
    def peak_bytes(self) -> int:
        return (
            self.weights_bytes + self.kv_bytes + self.activation_bytes
            + self.logits_bytes + self.staging_bytes + self.reserve_bytes
        )  # fmt: skip

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.peak_bytes


@dataclass(frozen=True)
class Plan:
    """The whole decision, before a byte of weights is read. `load(plan)` carries it out and nothing else."""

    spec: ModelSpec
    budget: MemoryBudget
    family: str
    exact: bool
    dtype: str
    weights_bytes: int
    resident_bytes: int  # on the devices that compute
    offloaded_bytes: int  # to RAM or disk, copied in and out every step
    kv_bytes_per_token: int
    kv_tokens: int  # context * concurrency
    context: int
    concurrency: int
    chunk_tokens: int
    device_map: dict[str, int | str]  # accelerate's form
    max_memory: dict[int | str, int]  # accelerate's form
    devices: tuple[DevicePlan, ...]
    given_up: tuple[str, ...] = ()  # in the order it was given up, sentences for a person
    notes: tuple[str, ...] = field(default=())

    @property
    def main_device(self) -> str:
        return self.devices[0].device
