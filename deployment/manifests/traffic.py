"""Who is reached through whom: Services, Ingress and Gateway routes, ServiceMonitors, NetworkPolicies."""

from __future__ import annotations

import re
from collections.abc import Iterator

from deployment.manifests.containers import is_port, one_of, port_list
from deployment.manifests.names import is_label
from deployment.manifests.objects import (
    Json,
    Objects,
    Pod,
    listed,
    mapping,
    matches,
    name,
    namespace,
    title,
    wrong,
)

_SERVICE_WORDS = {
    "type": ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
    "sessionAffinity": ("None", "ClientIP"),
    "externalTrafficPolicy": ("Cluster", "Local"),
    "internalTrafficPolicy": ("Cluster", "Local"),
    "ipFamilyPolicy": ("SingleStack", "PreferDualStack", "RequireDualStack"),
}
_PATH_TYPES = ("Exact", "Prefix", "ImplementationSpecific")
_LOWEST_NODE_PORT, _HIGHEST_NODE_PORT = 30000, 32767
_DURATION = re.compile(r"(\d+)(ms|[ywdhms])")
_UNIT_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800, "y": 31_536_000}
_A_PORT = "a port is a number from 1 to 65535"


def check(objects: Objects) -> Iterator[str]:
    for service in objects.of("Service"):
        yield from _service(service)
        yield from _selected_pods(objects, service)
    for ingress in objects.of("Ingress"):
        yield from _ingress(objects, ingress)
    for route in objects.of("HTTPRoute"):
        yield from _route(objects, route)
    for monitor in objects.of("ServiceMonitor"):
        yield from _monitor(objects, monitor)
    for policy in objects.of("NetworkPolicy"):
        yield from _policy(objects, policy)


# Services


def _service(service: Json) -> Iterator[str]:
    spec = mapping(service, "spec")
    for field, value, right in one_of(spec, _SERVICE_WORDS):
        yield wrong(service, f"spec.{field}", value, right)
    ports = list(listed(spec, "ports", "spec"))
    names, numbers = [port.get("name") for _, port in ports], [_listening(port) for _, port in ports]
    for index, (path, port) in enumerate(ports):
        own = port.get("name")
        if not is_port(port.get("port")):
            yield wrong(service, f"{path}.port", port.get("port"), _A_PORT)
        yield from _node_port(service, path, port)
        if port.get("protocol", "TCP") not in ("TCP", "UDP", "SCTP"):
            yield wrong(service, f"{path}.protocol", port["protocol"], "it is one of TCP, UDP, SCTP")
        if own is None and len(ports) > 1:
            yield wrong(service, f"{path}.name", own, "with several ports each has a name")
        if own is not None and not is_label(own):
            yield wrong(service, f"{path}.name", own, "it has up to 63 of a-z, 0-9 and -")
        if own is not None and own in names[:index]:
            yield wrong(service, f"{path}.name", own, "another port of the Service has this name")
        if numbers[index] in numbers[:index]:
            yield wrong(service, f"{path}.port", port.get("port"), "the Service has this port already")


def _listening(port: Json) -> tuple[object, object]:
    return port.get("port"), port.get("protocol", "TCP")


def _node_port(service: Json, path: str, port: Json) -> Iterator[str]:
    number = port.get("nodePort")
    if number is None:
        return
    if mapping(service, "spec").get("type", "ClusterIP") not in ("NodePort", "LoadBalancer"):
        yield wrong(service, f"{path}.nodePort", number, "the type has to be NodePort or LoadBalancer for it")
    elif not isinstance(number, int) or not _LOWEST_NODE_PORT <= number <= _HIGHEST_NODE_PORT:
        right = f"clusters give {_LOWEST_NODE_PORT} to {_HIGHEST_NODE_PORT} unless told otherwise"
        yield wrong(service, f"{path}.nodePort", number, right)


def _selected_pods(objects: Objects, service: Json) -> Iterator[str]:
    """Every pod that the Service takes listens on its ports: a Job's pod would be sent requests too."""
    selector = mapping(service, "spec", "selector")
    if not selector:  # endpoints are made by someone else
        return
    pods = objects.selected({"matchLabels": selector}, near=service)
    if not pods:
        yield wrong(service, "spec.selector", selector, "no pod has these labels")
    for path, port in listed(mapping(service, "spec"), "ports", "spec"):
        target = port.get("targetPort", port.get("port"))
        for pod in pods:
            yield from _target(service, f"{path}.targetPort", target, pod)


def _target(service: Json, path: str, target: object, pod: Pod) -> Iterator[str]:
    ports = [port for _, port in pod.ports()]
    if isinstance(target, int) and not is_port(target):
        yield wrong(service, path, target, _A_PORT)
    elif not any(target in (port.get("name"), port.get("containerPort")) for port in ports):
        yield wrong(service, path, target, f"the pod of {title(pod.owner)} has {port_list(ports)}")


# Routes


def _ingress(objects: Objects, ingress: Json) -> Iterator[str]:
    spec = mapping(ingress, "spec")
    yield from _ingress_backend(objects, ingress, "spec.defaultBackend", mapping(spec, "defaultBackend"))
    for rule_path, rule in listed(spec, "rules", "spec"):
        for path, entry in listed(mapping(rule, "http"), "paths", f"{rule_path}.http"):
            yield from _ingress_backend(objects, ingress, f"{path}.backend", mapping(entry, "backend"))
            if entry.get("pathType") not in _PATH_TYPES:
                right = f"it is one of {', '.join(_PATH_TYPES)}"
                yield wrong(ingress, f"{path}.pathType", entry.get("pathType"), right)
            elif entry["pathType"] != "ImplementationSpecific" and not str(entry.get("path")).startswith("/"):
                yield wrong(ingress, f"{path}.path", entry.get("path"), "it begins with /")


def _ingress_backend(objects: Objects, ingress: Json, path: str, backend: Json) -> Iterator[str]:
    wanted = mapping(backend, "service")
    if wanted:
        port = mapping(wanted, "port")
        number = port.get("number", port.get("name"))
        own = str(wanted.get("name"))
        yield from _backend(objects, ingress, f"{path}.service", (own, number))


def _backend(objects: Objects, document: Json, path: str, wanted: tuple[str, object]) -> Iterator[str]:
    """`wanted`: a Service and a port of it, by number or by name."""
    own, port = wanted
    service = objects.find("Service", own, near=document)
    if service is None:
        if not objects.is_elsewhere("Service", own):
            yield wrong(document, f"{path}.name", own, "there is no such Service")
        return
    ports = [entry for _, entry in listed(mapping(service, "spec"), "ports")]
    if port is None or not any(port in (entry.get("port"), entry.get("name")) for entry in ports):
        known = ", ".join(f"{entry.get('name', 'unnamed')} ({entry.get('port')})" for entry in ports)
        yield wrong(document, f"{path}.port", port, f"Service {own} has {known}")


def _route(objects: Objects, route: Json) -> Iterator[str]:
    if not mapping(route, "spec").get("parentRefs"):
        yield wrong(route, "spec.parentRefs", None, "a route names the Gateway that it hangs on")
    for rule_path, rule in listed(mapping(route, "spec"), "rules", "spec"):
        for path, match in listed(rule, "matches", rule_path):
            value = mapping(match, "path").get("value", "/")
            if mapping(match, "path").get("type") != "RegularExpression" and not str(value).startswith("/"):
                yield wrong(route, f"{path}.path.value", value, "it begins with /")
        for path, reference in listed(rule, "backendRefs", rule_path):
            if reference.get("kind", "Service") == "Service" and not reference.get("group"):
                wanted = str(reference.get("name")), reference.get("port")
                yield from _backend(objects, route, path, wanted)


# Monitors


def _monitor(objects: Objects, monitor: Json) -> Iterator[str]:
    selector = mapping(monitor, "spec", "selector")
    services = [service for service in objects.of("Service") if _is_monitored(service, monitor, selector)]
    if not services:
        yield wrong(monitor, "spec.selector", selector, "no Service has these labels")
        return
    known = {
        port.get("name") for service in services for _, port in listed(mapping(service, "spec"), "ports")
    }
    for path, endpoint in listed(mapping(monitor, "spec"), "endpoints", "spec"):
        port = endpoint.get("port")
        if port not in known and "targetPort" not in endpoint:
            right = f"it is the name of a Service's port: {', '.join(sorted(map(str, known)))}"
            yield wrong(monitor, f"{path}.port", port, right)
        interval, timeout = _seconds(endpoint.get("interval")), _seconds(endpoint.get("scrapeTimeout"))
        if interval and timeout and timeout > interval:
            right = f"it is at most the interval, {endpoint['interval']}"
            yield wrong(monitor, f"{path}.scrapeTimeout", endpoint["scrapeTimeout"], right)


def _seconds(duration: object) -> float:
    """Of a duration as Prometheus has them, such as "1m30s"; 0 where there is none, or 0 s."""
    parts = _DURATION.findall(str(duration or ""))
    return sum(int(number) * _UNIT_SECONDS[unit] for number, unit in parts)


def _is_monitored(service: Json, monitor: Json, selector: Json) -> bool:
    where = mapping(monitor, "spec", "namespaceSelector")
    names = where.get("matchNames") or [namespace(monitor)]
    is_there = bool(where.get("any")) or namespace(service) in names or not namespace(service)
    return is_there and matches(selector, mapping(service, "metadata", "labels"))


# Policies


def _policy(objects: Objects, policy: Json) -> Iterator[str]:
    spec = mapping(policy, "spec")
    selector = mapping(spec, "podSelector")
    pods = objects.selected(selector, near=policy)
    if not pods:
        yield wrong(policy, "spec.podSelector", selector, "no pod has these labels")
    for word in spec.get("policyTypes") or []:
        if word not in ("Ingress", "Egress"):
            yield wrong(policy, "spec.policyTypes", word, "it is Ingress or Egress")
    for rule_path, rule in listed(spec, "ingress", "spec"):
        for path, port in listed(rule, "ports", rule_path):
            yield from _policy_port(policy, f"{path}.port", port.get("port"), pods)


def _policy_port(policy: Json, path: str, wanted: object, pods: list[Pod]) -> Iterator[str]:
    ports = [port for pod in pods for _, port in pod.ports()]
    if wanted is None or not pods:
        return
    if not any(wanted in (port.get("name"), port.get("containerPort")) for port in ports):
        owners = ", ".join(sorted({name(pod.owner) for pod in pods}))
        yield wrong(policy, path, wanted, f"the pods that it takes ({owners}) have {port_list(ports)}")
