"""From settings to a Plan: what `plan` prints, and what `serve` carries out. Imports no torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from loader import checkpoint, probe
from loader.budget import MemoryBudget
from loader.plan import Plan, make_plan
from service.settings import Settings

BUILTIN_NAME = "snugfit-demo"


def model_source(settings: Settings) -> str:
    """What to load: the model that was asked for, or the folder of the built-in one."""
    return settings.model or str(resources.files("service") / "demo")


def served_name(settings: Settings) -> str:
    """The name that clients ask for: what was set, or the hub id, or the name of the folder."""
    if settings.served_model_name or settings.model is None:
        return settings.served_model_name or BUILTIN_NAME
    folder = Path(settings.model)
    return folder.resolve().name if folder.is_dir() else settings.model


def make_plan_for(settings: Settings, gpu: str | None = None) -> Plan:
    """Read the model's headers and plan. `gpu` is the size of a card that need not be in this machine.

    Raises LoaderError: a budget or a checkpoint that cannot be used, or a model that does not fit.
    """
    budget = MemoryBudget.parse(
        settings.budget, settings.max_memory, settings.device, probe.machine(), gpu=gpu
    )
    spec = checkpoint.read(model_source(settings), settings.revision)
    return make_plan(spec, budget, settings.context, settings.concurrency, settings.dtype)
