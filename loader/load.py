"""Carries a Plan out: builds the model, reads the weights into place, attaches accelerate's offload hooks."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from loader import hub, probe
from loader.arena import ALIGN_BYTES, Arena
from loader.device_map import accelerate_device
from loader.errors import DeviceUnavailable, UnsupportedModel
from loader.families import family_of
from loader.meter import Meter, give_back_what_is_freed
from loader.plan import Plan
from loader.probe import Machine
from loader.weights import CheckpointWeights

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]


class LoadedModel:
    """A model that is in its place. Whoever loaded it closes it."""

    def __init__(self, model: Any, plan: Plan, weights: CheckpointWeights, meter: Meter) -> None:
        self.model = model
        self.plan = plan
        self.device = _device(plan.main_device)
        self._weights = weights
        self._meter = meter

    @property
    def baseline_bytes(self) -> int:
        """Resident memory of the process before anything was loaded."""
        return self._meter.baseline_bytes

    def measured_peak_bytes(self) -> dict[str, int]:
        """The most that each device of the plan but the disk has held for this model so far, in bytes."""
        return self._meter.peak_bytes()

    def recount(self) -> None:
        """Count what a GPU's driver has taken since the start, too. Call it after a rehearsal."""
        self._meter.recount()

    def close(self) -> None:
        """Give the memory back. Idempotent."""
        if self.model is None:
            return
        self.model = None
        self._weights.close()
        gc.collect()  # accelerate's hooks and their modules refer to each other
        self._meter.close()


def load(plan: Plan, progress: Progress | None = None) -> LoadedModel:
    """Read the weights to where the plan says. `progress(done_bytes, total_bytes)` may raise to stop it.

    Raises TensorMismatch when the checkpoint and the architecture differ, DeviceUnavailable when a device of
    the plan is not here or has less free than the plan takes, CudaTakesMore when a GPU's context leaves too
    little of the budget, UnsupportedModel when transformers cannot build it.
    """
    _check_devices(plan)
    _check_room(plan, probe.machine())
    folder = hub.fetched(plan.spec).path
    assert folder is not None
    if "cpu" in plan.budget.compute:
        give_back_what_is_freed()
    model, dtypes = _build(plan)
    meter = Meter(plan)
    weights = CheckpointWeights(plan.spec, folder, model, dtypes)
    try:
        meter.refuse_what_cannot_fit(plan)
        weights.refuse_different_copies()
        host = _fill(model, plan, weights, dtypes, progress or _silent)
        _dispatch(model, plan, _Offloaded(host, weights))
    except BaseException:
        weights.close()
        meter.close()
        raise
    model.eval()
    return LoadedModel(model, plan, weights, meter)


def _silent(done_bytes: int, total_bytes: int) -> None:
    del done_bytes, total_bytes


def _device(name: str) -> torch.device:
    import torch

    return torch.device(name)


def _check_devices(plan: Plan) -> None:
    import torch

    for device in plan.budget.compute:
        index = int(device.partition(":")[2] or 0)
        if device.startswith("cuda") and index >= torch.cuda.device_count():
            raise DeviceUnavailable(
                f"the plan is for {device} and torch sees {torch.cuda.device_count()} GPUs here. "
                "Load it with --device cpu, or on the machine that has the card."
            )


def _check_room(plan: Plan, machine: Machine) -> None:
    """A budget is what may be used; whether so much is free is only known now."""
    for device in plan.devices:
        free_bytes = machine.free_bytes(device.device)
        if free_bytes is not None and free_bytes < device.peak_bytes:
            flag = "--budget" if device.device == plan.main_device else f"--max-memory {device.device}="
            more = "Raise the memory limit if this is a container" if device.device == "cpu" else ""
            raise DeviceUnavailable(
                f"{device.device} has {free_bytes:,} bytes free and the plan takes {device.peak_bytes:,}. "
                f"{more + ', end' if more else 'End'} what holds the rest, or give it less ({flag}): "
                "`snugfit plan` tells the smallest that works."
            )


def _build(plan: Plan) -> tuple[Any, dict[str, torch.dtype]]:
    """The model without weights (they are on meta, buffers are real) and the dtype of every parameter."""
    import torch
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    dtype = getattr(torch, plan.dtype)
    attention = "eager" if family_of(plan.family).eager else "sdpa"  # what the plan's activations are of
    try:
        config = AutoConfig.for_model(**dict(plan.spec.config))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    except (ValueError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError) as err:
        raise UnsupportedModel(plan.spec.source, plan.spec.model_type, str(err)) from err
    model.tie_weights()
    return model, {name: tensor.dtype for name, tensor in model.state_dict().items()}


def _fill(
    model: Any,
    plan: Plan,
    weights: CheckpointWeights,
    dtypes: Mapping[str, torch.dtype],
    progress: Progress,
) -> dict[str, torch.Tensor]:
    """Read every parameter that is kept in memory. Returns those that wait in RAM for a GPU."""
    places = {name: _place(name, plan) for name in weights.in_file_order()}
    shapes = {name: model.get_parameter_or_buffer(name).shape for name in places}
    sizes = {name: shapes[name].numel() * dtypes[name].itemsize for name in places}
    arenas = _arenas(places, sizes)
    total_bytes = sum(size for name, size in sizes.items() if places[name] != "disk")
    done_bytes = 0
    host: dict[str, torch.Tensor] = {}
    progress(0, total_bytes)
    for name, place in places.items():
        if place == "disk":
            continue
        tensor = arenas[place].take(shapes[name], dtypes[name])
        weights.fill(name, tensor)
        if place in plan.budget.compute:
            _set(model, name, tensor)
        else:
            host[name] = tensor
        done_bytes += sizes[name]
        progress(done_bytes, total_bytes)
    model.tie_weights()
    return host


def _arenas(places: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, Arena]:
    arenas = {}
    for place in sorted(set(places.values()) - {"disk"}):
        here = [size for name, size in sizes.items() if places[name] == place]
        arenas[place] = Arena(sum(here) + ALIGN_BYTES * len(here), _device(place))
    return arenas


def _place(name: str, plan: Plan) -> str:
    """The device of a parameter: the entry of the device map that is its nearest ancestor."""
    module = name
    while module not in plan.device_map:
        module = module.rpartition(".")[0]
        if not module and "" not in plan.device_map:
            reason = f"the plan has no place for {name}; give a budget under which nothing is offloaded"
            raise UnsupportedModel(plan.spec.source, plan.spec.model_type, reason)
    place = plan.device_map[module]
    return f"cuda:{place}" if isinstance(place, int) else place


def _set(model: Any, name: str, tensor: torch.Tensor) -> None:
    import torch

    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module._buffers[leaf] = tensor
    else:
        module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)


class _Offloaded(Mapping[str, "torch.Tensor"]):
    """Weights that hooks ask for at every step: from RAM where they wait there, else from the shards."""

    def __init__(self, host: dict[str, torch.Tensor], weights: CheckpointWeights) -> None:
        self._host = host
        self._weights = weights

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._host[name] if name in self._host else self._weights[name]

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Any:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def _dispatch(model: Any, plan: Plan, offloaded: _Offloaded) -> None:
    from accelerate import dispatch_model

    if set(plan.device_map.values()) <= {"cpu"}:
        return
    # The (empty) index says that nothing has to be written to disk: the shards are there already.
    dispatch_model(
        model,
        plan.device_map,
        # A name, not a torch.device, which never equals the "cpu" that accelerate compares it with.
        main_device=accelerate_device(plan.main_device),
        state_dict=offloaded,
        offload_index={},
    )
