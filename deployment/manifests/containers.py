"""Within one pod: ports, probes, environment, and the words that a field accepts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from deployment.manifests.names import is_port_name
from deployment.manifests.objects import Json, Objects, Pod, listed, mapping

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_LAST_PORT = 65535
_POD_WORDS = {
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "preemptionPolicy": ("PreemptLowerPriority", "Never"),
}
_CONTAINER_WORDS = {
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "terminationMessagePolicy": ("File", "FallbackToLogsOnError"),
}
_SPREAD_WORDS = {"whenUnsatisfiable": ("DoNotSchedule", "ScheduleAnyway")}
_TOLERATION_WORDS = {
    "operator": ("Exists", "Equal", "Lt", "Gt"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
}
# Whole numbers, and the least that each may be.
_PROBE_NUMBERS = {
    "initialDelaySeconds": 0,
    "timeoutSeconds": 1,
    "periodSeconds": 1,
    "successThreshold": 1,
    "failureThreshold": 1,
    "terminationGracePeriodSeconds": 1,
}


def check(objects: Objects) -> Iterator[str]:
    for pod in objects.pods:
        yield from _words(pod)
        yield from _ports(pod)
        for path, container in pod.containers():
            yield from _environment(pod, path, container)
        for path, container in pod.long_running():
            yield from _probes(pod, path, container)
        for path, container in pod.containers("initContainers"):
            yield from _useless_probes(pod, path, container)


def one_of(
    node: Mapping[str, Any], words: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[str, object, str]]:
    """(field, value, what is right) of every field whose value is none of its words."""
    for field, allowed in words.items():
        if node.get(field) is not None and node[field] not in allowed:
            yield field, node[field], f"it is one of {', '.join(allowed)}"


def is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LAST_PORT


def _words(pod: Pod) -> Iterator[str]:
    for field, value, right in one_of(pod.spec, _POD_WORDS):
        yield pod.wrong(f"{pod.path}.{field}", value, right)
    for path, container in pod.containers():
        for field, value, right in one_of(container, _CONTAINER_WORDS):
            yield pod.wrong(f"{path}.{field}", value, right)
    for key, words in (("tolerations", _TOLERATION_WORDS), ("topologySpreadConstraints", _SPREAD_WORDS)):
        for path, item in listed(pod.spec, key, pod.path):
            for field, value, right in one_of(item, words):
                yield pod.wrong(f"{path}.{field}", value, right)


# Ports


def _ports(pod: Pod) -> Iterator[str]:
    names: set[object] = set()
    numbers: set[tuple[object, object]] = set()
    for path, port in pod.ports():
        number, own, protocol = port.get("containerPort"), port.get("name"), port.get("protocol", "TCP")
        yield from _range(pod, f"{path}.containerPort", number)
        if "hostPort" in port:
            yield from _range(pod, f"{path}.hostPort", port["hostPort"])
        if protocol not in ("TCP", "UDP", "SCTP"):
            yield pod.wrong(f"{path}.protocol", protocol, "it is one of TCP, UDP, SCTP")
        if own is not None and not is_port_name(own):
            right = "a port's name has up to 15 of a-z, 0-9 and -, among them a letter"
            yield pod.wrong(f"{path}.name", own, right)
        if own is not None and own in names:
            yield pod.wrong(f"{path}.name", own, "another port of the pod has this name")
        if (number, protocol) in numbers:
            yield pod.wrong(f"{path}.containerPort", number, f"the pod has this {protocol} port already")
        names.add(own)
        numbers.add((number, protocol))


def _range(pod: Pod, path: str, number: object) -> Iterator[str]:
    if not is_port(number):
        yield pod.wrong(path, number, f"a port is a number from 1 to {_LAST_PORT}")


# Probes


def _probes(pod: Pod, path: str, container: Json) -> Iterator[str]:
    for field in PROBES:
        probe = mapping(container, field)
        if probe:
            yield from _probe(pod, f"{path}.{field}", probe)
            yield from _handler_port(pod, f"{path}.{field}", probe, container)
    threshold = mapping(container, "livenessProbe").get("successThreshold", 1)
    if threshold != 1:
        yield pod.wrong(f"{path}.livenessProbe.successThreshold", threshold, "for liveness it has to be 1")
    for hook in ("postStart", "preStop"):
        handler = mapping(container, "lifecycle", hook)
        yield from _handler_port(pod, f"{path}.lifecycle.{hook}", handler, container)


def _probe(pod: Pod, path: str, probe: Json) -> Iterator[str]:
    handlers = [key for key in ("exec", "httpGet", "tcpSocket", "grpc") if key in probe]
    if len(handlers) != 1:
        yield pod.wrong(path, handlers, "a probe has one of exec, httpGet, tcpSocket and grpc")
    for field, least in _PROBE_NUMBERS.items():
        number = probe.get(field, least)
        if not isinstance(number, int) or number < least:
            yield pod.wrong(f"{path}.{field}", number, f"it is a whole number, {least} or more")


def _handler_port(pod: Pod, path: str, handler: Json, container: Json) -> Iterator[str]:
    """A port by name has to be the container's own; one by number too, where the container names any."""
    ports = [port for _, port in listed(container, "ports")]
    for field in ("httpGet", "tcpSocket", "grpc"):
        wanted = mapping(handler, field).get("port")
        if wanted is None:
            continue
        if isinstance(wanted, int) and not is_port(wanted):
            yield from _range(pod, f"{path}.{field}.port", wanted)
        elif not any(wanted in (port.get("name"), port.get("containerPort")) for port in ports) and (
            ports or isinstance(wanted, str)
        ):
            yield pod.wrong(f"{path}.{field}.port", wanted, f"the container has {port_list(ports)}")


def port_list(ports: list[Json]) -> str:
    """ "port http (8000)", for sentences."""
    known = [f"{port.get('name', 'unnamed')} ({port.get('containerPort')})" for port in ports]
    return f"port {', '.join(known)}" if known else "no port"


def _useless_probes(pod: Pod, path: str, container: Json) -> Iterator[str]:
    if container.get("restartPolicy") == "Always":
        return
    for field in (*PROBES, "lifecycle"):
        if container.get(field):
            right = "of the init containers only those that stay (restartPolicy: Always) may have it"
            yield pod.wrong(f"{path}.{field}", container[field], right)


# Environment


def _environment(pod: Pod, path: str, container: Json) -> Iterator[str]:
    names = set()
    for env_path, variable in listed(container, "env", path):
        own = variable.get("name")
        if not isinstance(own, str) or not _ENV_NAME.fullmatch(own):
            yield pod.wrong(f"{env_path}.name", own, "a variable's name has letters, digits, _, - and .")
        if own in names:
            yield pod.wrong(f"{env_path}.name", own, "the container has this variable already")
        names.add(own)
        value = variable.get("value")
        if value is not None and not isinstance(value, str):
            yield pod.wrong(f"{env_path}.value", value, "it has to be text: quote it")
        if value is not None and "valueFrom" in variable:
            yield pod.wrong(f"{env_path}.value", value, "a variable has a value or a valueFrom")
