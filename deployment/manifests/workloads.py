"""Deployments and Jobs: selectors, strategies, restart policies, rules about failures."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from deployment.manifests.containers import one_of
from deployment.manifests.objects import Json, Objects, Pod, listed, mapping, matches, title, wrong

_CONTROLLERS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet")
_RULE_ACTIONS = ("FailJob", "FailIndex", "Ignore", "Count")
_STATUSES = ("True", "False", "Unknown")
_HIGHEST_EXIT_CODE = 255


def check(objects: Objects) -> Iterator[str]:
    for pod in objects.pods:
        if pod.owner.get("kind") in _CONTROLLERS:
            yield from _selector(objects, pod)
            yield from _restarts(pod, ("Always",))
        elif pod.owner.get("kind") in ("Job", "CronJob"):
            yield from _job(pod)
        else:
            yield from _restarts(pod, ("Always", "OnFailure", "Never"))
    for deployment in objects.of("Deployment"):
        yield from _strategy(deployment)


def share(value: object, whole: int) -> int | None:
    """An IntOrString such as 2 or "50%" as a number of pods, rounded up; None if it is neither."""
    text = str(value)
    if isinstance(value, int):
        return value
    return ceil(int(text[:-1]) * whole / 100) if text.endswith("%") and text[:-1].isdigit() else None


def _selector(objects: Objects, pod: Pod) -> Iterator[str]:
    spec = mapping(pod.owner, "spec")
    selector = mapping(spec, "selector")
    if not selector:
        yield pod.wrong("spec.selector", None, "it names labels of the pod template")
    elif not matches(selector, pod.labels):
        yield pod.wrong("spec.selector", selector, f"the pod template has the labels {_said(pod.labels)}")
    else:
        for other in objects.selected(selector, near=pod.owner):
            if other.owner is not pod.owner:
                right = f"it takes the pods of {title(other.owner)} too: one label has to differ"
                yield pod.wrong("spec.selector", selector, right)


def _said(labels: Json) -> str:
    return ", ".join(f"{key}={value}" for key, value in labels.items()) or "(none)"


def _restarts(pod: Pod, allowed: tuple[str, ...]) -> Iterator[str]:
    policy = pod.spec.get("restartPolicy", "Always")
    if policy not in allowed:
        right = f"for a {pod.owner.get('kind')} it is {' or '.join(allowed)}"
        yield pod.wrong(f"{pod.path}.restartPolicy", pod.spec.get("restartPolicy"), right)


def _strategy(deployment: Json) -> Iterator[str]:
    strategy = mapping(deployment, "spec", "strategy")
    for field, value, right in one_of(strategy, {"type": ("RollingUpdate", "Recreate")}):
        yield wrong(deployment, f"spec.strategy.{field}", value, right)
    rolling = mapping(strategy, "rollingUpdate")
    if strategy.get("type") == "Recreate" and "rollingUpdate" in strategy:
        yield wrong(deployment, "spec.strategy.rollingUpdate", rolling, "Recreate takes none")
    if [str(rolling.get(key)).rstrip("%") for key in ("maxSurge", "maxUnavailable")] == ["0", "0"]:
        right = "with maxSurge 0 a rollout never begins unless this is 1 or more"
        yield wrong(
            deployment, "spec.strategy.rollingUpdate.maxUnavailable", rolling["maxUnavailable"], right
        )
    for field in ("maxSurge", "maxUnavailable"):
        if field in rolling and share(rolling[field], 1) is None:
            right = 'it is a number of pods or a share such as "25%"'
            yield wrong(deployment, f"spec.strategy.rollingUpdate.{field}", rolling[field], right)


# Jobs


def _job(pod: Pod) -> Iterator[str]:
    path = pod.path.removesuffix(".template.spec")
    spec = mapping(pod.owner, *path.split("."))
    if "podFailurePolicy" not in spec:
        yield from _restarts(pod, ("Never", "OnFailure"))
    elif pod.spec.get("restartPolicy") != "Never":
        right = "podFailurePolicy needs Never: a container that is restarted in place never fails its pod"
        yield pod.wrong(f"{pod.path}.restartPolicy", pod.spec.get("restartPolicy"), right)
    for field in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished"):
        number = spec.get(field, 1)
        if not isinstance(number, int) or number < 0:
            yield pod.wrong(f"{path}.{field}", number, "it is a whole number, 0 or more")
    for rule_path, rule in listed(mapping(spec, "podFailurePolicy"), "rules", f"{path}.podFailurePolicy"):
        yield from _rule(pod, rule_path, rule)


def _rule(pod: Pod, path: str, rule: Json) -> Iterator[str]:
    if rule.get("action") not in _RULE_ACTIONS:
        yield pod.wrong(f"{path}.action", rule.get("action"), f"it is one of {', '.join(_RULE_ACTIONS)}")
    conditions = [key for key in ("onExitCodes", "onPodConditions") if rule.get(key)]
    if len(conditions) != 1:
        yield pod.wrong(path, conditions, "a rule has one of onExitCodes and onPodConditions")
    for condition_path, condition in listed(rule, "onPodConditions", path):
        if condition.get("status") not in _STATUSES:  # that it may be left out is new in 1.35
            right = f"before Kubernetes 1.35 it has to be there, as one of {', '.join(_STATUSES)}"
            yield pod.wrong(f"{condition_path}.status", condition.get("status"), right)
    codes = mapping(rule, "onExitCodes")
    if codes:
        yield from _exit_codes(pod, f"{path}.onExitCodes", codes)


def _exit_codes(pod: Pod, path: str, codes: Json) -> Iterator[str]:
    names = [container.get("name") for _, container in pod.containers("initContainers", "containers")]
    wanted = codes.get("containerName")
    if wanted is not None and wanted not in names:
        yield pod.wrong(f"{path}.containerName", wanted, f"the pod has {', '.join(map(str, names))}")
    if codes.get("operator") not in ("In", "NotIn"):
        yield pod.wrong(f"{path}.operator", codes.get("operator"), "it is In or NotIn")
    values = codes.get("values") or []
    if not values or len(set(values)) != len(values):
        yield pod.wrong(f"{path}.values", values, "it lists exit codes, each once")
    for value in values:
        if not isinstance(value, int) or not 0 <= value <= _HIGHEST_EXIT_CODE:
            yield pod.wrong(f"{path}.values", value, f"an exit code is 0 to {_HIGHEST_EXIT_CODE}")
        elif value == 0 and codes.get("operator") == "In":
            yield pod.wrong(f"{path}.values", value, "0 is no failure")
