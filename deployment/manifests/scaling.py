"""What changes the number of pods: autoscalers and disruption budgets."""

from __future__ import annotations

from collections.abc import Iterator

from deployment.manifests.objects import Json, Objects, Pod, mapping, scale_target, title, wrong
from deployment.manifests.workloads import share

_BOUNDS = {
    "HorizontalPodAutoscaler": ("minReplicas", "maxReplicas"),
    "ScaledObject": ("minReplicaCount", "maxReplicaCount"),
}
# What applies where the field is not set.
_LEAST = {"HorizontalPodAutoscaler": 1, "ScaledObject": 0}
_EVICTION_POLICIES = ("IfHealthyBudget", "AlwaysAllow")


def check(objects: Objects) -> Iterator[str]:
    for scaler in objects.of(*_BOUNDS):
        yield from _target(objects, scaler)
        yield from _bounds(scaler)
    for document in objects.of("Deployment", "StatefulSet"):
        yield from _one_scaler(objects, document)
    for budget in objects.of("PodDisruptionBudget"):
        yield from _budget(objects, budget)


def _target(objects: Objects, scaler: Json) -> Iterator[str]:
    kind, own = scale_target(scaler)
    target = objects.find(kind, own, near=scaler)
    if target is None and not objects.is_elsewhere(kind, own):
        yield wrong(scaler, "spec.scaleTargetRef.name", own, f"there is no such {kind}")
    version = mapping(scaler, "spec", "scaleTargetRef").get("apiVersion", "apps/v1")
    if target is not None and version != target.get("apiVersion"):
        right = f"{title(target)} is of {target.get('apiVersion')}"
        yield wrong(scaler, "spec.scaleTargetRef.apiVersion", version, right)


def _bounds(scaler: Json) -> Iterator[str]:
    low, high = _BOUNDS[scaler["kind"]]
    spec = mapping(scaler, "spec")
    least, most = spec.get(low, _LEAST[scaler["kind"]]), spec.get(high, 100)
    for field, value in ((low, least), (high, most)):
        if not isinstance(value, int) or value < _LEAST[scaler["kind"]]:
            right = f"it is a whole number, {_LEAST[scaler['kind']]} or more"
            yield wrong(scaler, f"spec.{field}", value, right)
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield wrong(scaler, f"spec.{low}", least, f"it is at most {high}, {most}")


def _one_scaler(objects: Objects, document: Json) -> Iterator[str]:
    scalers = list(objects.autoscalers(document))
    replicas = mapping(document, "spec").get("replicas")
    if scalers and replicas is not None:
        right = f"{title(scalers[0])} sets it: every upgrade would set it back, so leave it out"
        yield wrong(document, "spec.replicas", replicas, right)
    for second in scalers[1:]:
        right = f"{title(scalers[0])} scales it already"
        yield wrong(second, "spec.scaleTargetRef.name", scale_target(second)[1], right)


# Disruption budgets


def _budget(objects: Objects, budget: Json) -> Iterator[str]:
    spec = mapping(budget, "spec")
    selector = mapping(spec, "selector")
    pods = [pod for pod in objects.selected(selector, near=budget) if selector]
    if not pods:
        yield wrong(budget, "spec.selector", selector or None, "no pod has these labels")
    given = [field for field in ("minAvailable", "maxUnavailable") if field in spec]
    if len(given) != 1:
        yield wrong(budget, "spec", given, "a budget has one of minAvailable and maxUnavailable")
    elif pods:
        yield from _blocks_evictions(objects, budget, given[0], pods)
    policy = spec.get("unhealthyPodEvictionPolicy", _EVICTION_POLICIES[0])
    if policy not in _EVICTION_POLICIES:
        right = f"it is one of {', '.join(_EVICTION_POLICIES)}"
        yield wrong(budget, "spec.unhealthyPodEvictionPolicy", policy, right)


def _blocks_evictions(objects: Objects, budget: Json, field: str, pods: list[Pod]) -> Iterator[str]:
    replicas = sum(_replicas(objects, pod.owner) for pod in pods)
    value = mapping(budget, "spec")[field]
    number = share(value, replicas)
    if number is None or number < 0:
        yield wrong(budget, f"spec.{field}", value, 'it is a number of pods or a share such as "50%"')
        return
    if str(value).endswith("%") and number > replicas:
        yield wrong(budget, f"spec.{field}", value, "a share is 100% at most")
        return
    may_go = number if field == "maxUnavailable" else replicas - number
    if replicas and may_go < 1:
        right = f"none of {replicas} pods may be evicted then: no node could ever be drained"
        yield wrong(budget, f"spec.{field}", value, right)


def _replicas(objects: Objects, owner: Json) -> int:
    """How many pods there are at the least."""
    for scaler in objects.autoscalers(owner):
        low, _ = _BOUNDS[scaler["kind"]]
        return max(1, _number(mapping(scaler, "spec").get(low)))  # KEDA's 0 leaves nothing to evict
    return _number(mapping(owner, "spec").get("replicas"))


def _number(replicas: object) -> int:
    return replicas if isinstance(replicas, int) else 1
