"""A plan as the Helm chart's values: what the pod asks for, how long it may take to start, and the settings
that make it the same plan there."""

from __future__ import annotations

from typing import Any

from loader.batching import CONTINUOUS
from loader.plan import Plan

MiB, GiB = 2**20, 2**30
# A network disk that has not read the shards before; local ones are ten times as fast.
COLD_DISK_BYTES_PER_SECOND = 200_000_000
# From the hub, where the pod has to get the model first.
DOWNLOAD_BYTES_PER_SECOND = 25_000_000
# Python, torch and transformers from a cold disk, the tokenizer, packing: the built-in model took 36 s on two
# cores that eight other programs wanted too, 10 s on quieter ones.
START_SECONDS = 60
# A core without bf16 products, with others on it. 28e9 were seen.
SLOW_CPU_OPERATIONS_PER_SECOND = 20_000_000_000
# Chunks that the engine rehearses, of the longest that a step may have.
REHEARSED_CHUNKS = 2
PROBE_PERIOD_SECONDS = 5
# What CUDA's libraries keep on the host beside the process itself: an estimate for torch 2.13, on the large
# side.
CUDA_HOST_BYTES = 1536 * MiB
# The kernel charges a pod for the pages of files it reads and takes them back slowly; and there is the thread
# stack, the queue of requests, the tokenizer.
MARGIN_BYTES = 256 * MiB
MARGIN_PERCENT = 10


def helm_values(plan: Plan) -> dict[str, Any]:
    """Values for `helm install --values`: Kubernetes quantities, and keys of docs/config.md under `config`.

    Memory is in whole Mi, request and limit alike: that keeps the scheduler from promising memory that the
    plan counts on. `config` is what was planned with, because what the pod would find free is another figure.
    """
    memory = f"{pod_memory_bytes(plan) // MiB}Mi"
    gpus = sum(device.startswith("cuda:") for device in plan.budget.compute)
    cards = {"nvidia.com/gpu": gpus} if gpus else {}
    disk = {"ephemeral-storage": _whole(plan.spec.file_bytes, GiB, "Gi")} if _from_the_hub(plan) else {}
    return {
        "config": {
            "max_memory": _limits(plan),
            "dtype": plan.dtype,
            "context": plan.context,
            "concurrency": plan.concurrency,
        },
        "resources": {
            "requests": {"memory": memory, **disk, **cards},
            "limits": {"memory": memory, **cards},
        },
        "startupProbe": {
            "periodSeconds": PROBE_PERIOD_SECONDS,
            "failureThreshold": -(-start_seconds(plan) // PROBE_PERIOD_SECONDS),
        },
    }


def _limits(plan: Plan) -> str:
    """The budget in the form of `max_memory`: "0=16000000000,cpu=5000000000".

    GPUs are counted anew: whichever they were here, a pod sees those it is given as 0, 1 and so on.
    0 for a place that could take offloaded weights and has none: what was free there while it was planned
    means nothing, and the pod's memory has no room for them.
    """
    used = {*plan.budget.compute, *(device.device for device in plan.devices)}
    limits = {place: n_bytes if place in used else 0 for place, n_bytes in plan.budget.limits.items()}
    gpus = (device for device in plan.budget.compute if device.startswith("cuda:"))
    numbers = {device: str(number) for number, device in enumerate(gpus)}
    return ",".join(f"{numbers.get(place, place)}={n_bytes}" for place, n_bytes in limits.items())


def _from_the_hub(plan: Plan) -> bool:
    return plan.spec.revision is not None


def _whole(n_bytes: int, unit: int, suffix: str) -> str:
    """A quantity with a tenth to spare, in whole units."""
    return f"{-(-n_bytes * 11 // (10 * unit))}{suffix}"


def pod_memory_bytes(plan: Plan) -> int:
    """Host memory of the pod, in whole MiB: the process before loading, what loading adds, and a margin."""
    host = sum(device.peak_bytes for device in plan.devices if device.device == "cpu")
    cuda = CUDA_HOST_BYTES if plan.main_device != "cpu" else 0
    needed = plan.startup_bytes + cuda + host
    return -(-(needed + needed * MARGIN_PERCENT // 100 + MARGIN_BYTES) // MiB) * MiB


def start_seconds(plan: Plan) -> int:
    """How long the slowest start may take: every shard from the hub or a cold disk, on the CPU the largest
    steps on a slow one, and the rest."""
    file_bytes = plan.spec.file_bytes
    download = file_bytes // DOWNLOAD_BYTES_PER_SECOND if _from_the_hub(plan) else 0
    rehearsal = _rehearsed_operations(plan) // SLOW_CPU_OPERATIONS_PER_SECOND
    return START_SECONDS + download + -(-file_bytes // COLD_DISK_BYTES_PER_SECOND) + rehearsal


def _rehearsed_operations(plan: Plan) -> int:
    """On the CPU; a GPU is through in no time. Of layers that are alike one is rehearsed, if they are served
    from blocks and nothing is offloaded."""
    if plan.main_device != "cpu":
        return 0
    operations = 2 * _parameters(plan) * REHEARSED_CHUNKS * plan.chunk_tokens
    if plan.batching != CONTINUOUS or plan.offloaded_bytes:
        return operations
    return operations * len(plan.kv.groups) // sum(len(group.layers) for group in plan.kv.groups)


def _parameters(plan: Plan) -> int:
    """Of the weights as they are held."""
    return plan.weights_bytes // (4 if plan.dtype == "float32" else 2)
