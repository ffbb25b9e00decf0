"""A plan as the Helm chart's values: what the pod asks for, and how long it may take to start."""

from __future__ import annotations

from typing import Any

from loader.plan import Plan

MiB = 2**20
# A network disk that has not read the shards before; local ones are ten times as fast.
COLD_DISK_BYTES_PER_SECOND = 200_000_000
# Imports, the tokenizer, and the rehearsal of the worst forward.
START_SECONDS = 60
PROBE_PERIOD_SECONDS = 5
# What CUDA's libraries keep on the host beside the process itself: an estimate for torch 2.13, on the large
# side.
CUDA_HOST_BYTES = 1536 * MiB
# The kernel charges a pod for the pages of files it reads and takes them back slowly; and there is the thread
# stack, the queue of requests, the tokenizer.
MARGIN_BYTES = 256 * MiB
MARGIN_PERCENT = 10


def helm_values(plan: Plan) -> dict[str, Any]:
    """Kubernetes quantities for `helm install --values`; memory in whole Mi, request and limit alike.

    Equal request and limit keep the scheduler from promising memory that the plan counts on.
    """
    memory = f"{pod_memory_bytes(plan) // MiB}Mi"
    gpus = sum(device.startswith("cuda:") for device in plan.budget.compute)
    cards = {"nvidia.com/gpu": gpus} if gpus else {}
    return {
        "resources": {"requests": {"memory": memory, **cards}, "limits": {"memory": memory, **cards}},
        "startupProbe": {
            "periodSeconds": PROBE_PERIOD_SECONDS,
            "failureThreshold": -(-start_seconds(plan) // PROBE_PERIOD_SECONDS),
        },
    }


def pod_memory_bytes(plan: Plan) -> int:
    """Host memory of the pod, in whole MiB: the process before loading, what loading adds, and a margin."""
    host = sum(device.peak_bytes for device in plan.devices if device.device == "cpu")
    cuda = CUDA_HOST_BYTES if plan.main_device != "cpu" else 0
    needed = plan.startup_bytes + cuda + host
    return -(-(needed + needed * MARGIN_PERCENT // 100 + MARGIN_BYTES) // MiB) * MiB


def start_seconds(plan: Plan) -> int:
    """How long the slowest start may take: every shard from a cold disk, and the rest."""
    return START_SECONDS + -(-plan.spec.file_bytes // COLD_DISK_BYTES_PER_SECOND)
