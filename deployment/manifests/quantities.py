"""Quantities such as "500m" and "16Gi": what is none, and what was not meant (memory in thousandths)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal

from deployment.manifests.objects import Json, Objects, listed, mapping, wrong

_FORM = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+))(?:([numkMGTPE]|[KMGTPE]i)|[eE]([+-]?\d+))?")
_DECIMAL = {
    unit: Decimal(10) ** power
    for unit, power in zip("numkMGTPE", (-9, -6, -3, 3, 6, 9, 12, 15, 18), strict=True)
}
_BINARY = {f"{unit}i": Decimal(1024) ** power for power, unit in enumerate("KMGTPE", 1)}
_UNITS = {"": Decimal(1), **_DECIMAL, **_BINARY}
_RIGHT = "a quantity is a number with a unit of m, k, M, G, T, Ki, Mi, Gi, Ti or none"
_LEAST_MEMORY = Decimal(1024**2)


def parse(value: object) -> Decimal | None:
    """The number that a Kubernetes quantity stands for; None if it is none."""
    text = str(value)
    match = _FORM.fullmatch(text) if not isinstance(value, bool) else None
    if match is None:
        return None
    number, unit, exponent = match.groups()
    return Decimal(number) * (Decimal(10) ** int(exponent) if exponent else _UNITS[unit or ""])


def check(objects: Objects) -> Iterator[str]:
    for pod in objects.pods:
        for path, container in pod.containers():
            yield from _resources(pod.owner, f"{path}.resources", mapping(container, "resources"))
        yield from _resources(pod.owner, f"{pod.path}.resources", mapping(pod.spec, "resources"))
        yield from _volumes(pod.owner, pod.path, pod.spec)
    for claim in objects.of("PersistentVolumeClaim"):
        yield from _resources(claim, "spec.resources", mapping(claim, "spec", "resources"))
    for owner in objects.of("StatefulSet"):
        for path, claim in listed(mapping(owner, "spec"), "volumeClaimTemplates", "spec"):
            yield from _resources(owner, f"{path}.spec.resources", mapping(claim, "spec", "resources"))
    for scaler in objects.of("HorizontalPodAutoscaler"):
        yield from _targets(scaler)


def _volumes(owner: Json, path: str, spec: Json) -> Iterator[str]:
    for volume_path, volume in listed(spec, "volumes", path):
        limit = mapping(volume, "emptyDir").get("sizeLimit")
        if limit is not None:
            yield from _amount(owner, f"{volume_path}.emptyDir.sizeLimit", "storage", limit)
        claim = mapping(volume, "ephemeral", "volumeClaimTemplate", "spec", "resources")
        yield from _resources(owner, f"{volume_path}.ephemeral.volumeClaimTemplate.spec.resources", claim)


def _targets(scaler: Json) -> Iterator[str]:
    for path, metric in listed(mapping(scaler, "spec"), "metrics", "spec"):
        source = str(metric.get("type", ""))
        key = source[:1].lower() + source[1:]
        target = mapping(metric, key, "target")
        for field in ("value", "averageValue"):
            if field in target and parse(target[field]) is None:
                yield wrong(scaler, f"{path}.{key}.target.{field}", target[field], _RIGHT)


def _resources(owner: Json, path: str, resources: Json) -> Iterator[str]:
    requests, limits = mapping(resources, "requests"), mapping(resources, "limits")
    for kind, amounts in (("requests", requests), ("limits", limits)):
        for resource, value in amounts.items():
            yield from _amount(owner, f"{path}.{kind}.{resource}", resource, value)
    for resource, value in requests.items():
        yield from _against_limit(owner, path, resource, value, limits.get(resource))


def _amount(owner: Json, path: str, resource: str, value: object) -> Iterator[str]:
    number = parse(value)
    if number is None:
        yield wrong(owner, path, value, _RIGHT)
    elif number < 0:
        yield wrong(owner, path, value, "an amount is 0 or more")
    elif resource == "cpu":
        if str(value).endswith(tuple(_BINARY)):
            yield wrong(owner, path, value, "CPUs are counted in cores (2) or thousandths of one (500m)")
    elif str(value).endswith(("n", "u", "m")) or ("/" in resource and number != int(number)):
        yield wrong(owner, path, value, "only CPUs have fractions; m is a thousandth, M and Mi are millions")
    elif resource == "memory" and 0 < number < _LEAST_MEMORY:
        yield wrong(owner, path, value, f"that is {number} bytes: a unit such as Mi or Gi is missing")


def _against_limit(owner: Json, path: str, resource: str, value: object, limit: object) -> Iterator[str]:
    wanted, most = parse(value), parse(limit) if limit is not None else None
    # Such as nvidia.com/gpu: of what is not Kubernetes' own, nothing is handed out twice.
    is_extended = "/" in resource
    if is_extended and limit is None:
        yield wrong(owner, f"{path}.limits.{resource}", None, f"it has to be the request, {value}")
    elif wanted is None or most is None:
        return
    elif is_extended and wanted != most:
        yield wrong(owner, f"{path}.requests.{resource}", value, f"it has to be the limit, {limit}")
    elif wanted > most:
        yield wrong(owner, f"{path}.requests.{resource}", value, f"a request is at most the limit, {limit}")
