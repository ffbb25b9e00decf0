"""Measures what a model adds to each computing device, and caps the GPUs before anything is allocated."""

from __future__ import annotations

import gc

from loader import probe
from loader.plan import Plan


class Meter:
    """Start it when everything but the model is in memory; it counts from there."""

    def __init__(self, plan: Plan) -> None:
        self._compute = plan.budget.compute
        self._context_bytes = {d: _cap(d, plan.budget.limits[d]) for d in self._compute if d != "cpu"}
        gc.collect()
        probe.reset_peak()
        self.baseline_bytes = probe.resident_bytes()

    def peak_bytes(self) -> dict[str, int]:
        """The most so far, by device: memory above the start on a CPU, context and allocator on a GPU."""
        return {device: self._peak(device) for device in self._compute}

    def _peak(self, device: str) -> int:
        if device == "cpu":
            return max(0, probe.peak_resident_bytes() - self.baseline_bytes)
        import torch

        return self._context_bytes[device] + torch.cuda.max_memory_reserved(device)


def _cap(device: str, budget_bytes: int) -> int:
    """Create the CUDA context, cap the allocator at the budget less the context, and return its bytes."""
    import torch

    before = {gpu.device: gpu.free_bytes for gpu in probe.machine().gpus}
    torch.empty(1, device=device)
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    context_bytes = max(0, before.get(device, free_bytes) - free_bytes)
    fraction = (budget_bytes - context_bytes) / total_bytes
    torch.cuda.set_per_process_memory_fraction(max(0.0, min(1.0, fraction)), device)
    return context_bytes
