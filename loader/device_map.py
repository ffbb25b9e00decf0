"""A plan's placement in accelerate's form: few entries, none inside another, and every module covered."""

from __future__ import annotations

import re
from collections.abc import Mapping

_LAYER = re.compile(r"^(?:.*\.)?(?:layers|h|blocks|block)\.\d+(?=\.)")


def accelerate_device(device: str) -> int | str:
    """ "cuda:1" -> 1; "cpu" and "disk" stay."""
    return int(device.removeprefix("cuda:")) if device.startswith("cuda:") else device


def device_map(places: Mapping[str, str]) -> dict[str, int | str]:
    """Module -> device, as `accelerate.dispatch_model` takes it.

    A model on one device is {"": device}. Otherwise a layer on one device is one entry, and a layer on
    several is split at the highest modules that are on one. Modules are never listed together with their
    parents.
    """
    devices = {accelerate_device(device) for device in places.values()}
    if len(devices) == 1:
        return {"": devices.pop()}
    found: dict[str, int | str] = {}
    for name, members in _grouped(places).items():
        found.update(_split(name, members))
    return found


def _grouped(places: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Modules by decoder layer; those outside the layers by themselves."""
    groups: dict[str, dict[str, str]] = {}
    for module, device in places.items():
        layer = _LAYER.match(module)
        groups.setdefault(layer.group() if layer else module, {})[module] = device
    return groups


def _split(name: str, members: Mapping[str, str]) -> dict[str, int | str]:
    devices = set(members.values())
    if len(devices) == 1:
        return {name: accelerate_device(devices.pop())}
    children: dict[str, dict[str, str]] = {}
    for module, device in members.items():
        child = name + "." + module[len(name) + 1 :].split(".")[0]
        children.setdefault(child, {})[module] = device
    found: dict[str, int | str] = {}
    for child, inside in children.items():
        found.update(_split(child, inside))
    return found
