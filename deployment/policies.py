"""The Pod Security Standards at the level `restricted`, which includes `baseline`, on every pod of a release.

Written from the standard itself (kubernetes.io, "Pod Security Standards"), with what its text lacks and the
admission controller does: image volumes are allowed (since 1.33).
Pods of Windows are not told apart: there are none here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deployment.manifests.containers import PROBES
from deployment.manifests.objects import Json, Objects, Pod, listed, mapping

Rule = Callable[[Pod], Iterator[str]]
_Allowed = tuple[object, ...]

SAFE_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_syncookies",
    }
)
VOLUME_TYPES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_SELINUX_TYPES = (None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
_SECCOMP = ("RuntimeDefault", "Localhost")
_APPARMOR = (None, "RuntimeDefault", "Localhost")
_APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"


def problems(documents: Sequence[Json]) -> list[str]:
    """A sentence for each field of a pod that `restricted` refuses: object, field, value, what is right."""
    return [sentence for pod in Objects(documents).pods for rule in RULES for sentence in rule(pod)]


# Baseline


def host_namespaces(pod: Pod) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        yield from _refuse(pod, f"{pod.path}.{field}", pod.spec.get(field), (None, False))


def windows_host_process(pod: Pod) -> Iterator[str]:
    for path, context in _contexts(pod):
        value = mapping(context, "windowsOptions").get("hostProcess")
        yield from _refuse(pod, f"{path}.windowsOptions.hostProcess", value, (None, False))


def privileged(pod: Pod) -> Iterator[str]:
    for path, context in _container_contexts(pod):
        yield from _refuse(pod, f"{path}.privileged", context.get("privileged"), (None, False))


def host_ports(pod: Pod) -> Iterator[str]:
    for container_path, container in pod.containers():
        for path, port in listed(container, "ports", container_path):
            yield from _refuse(pod, f"{path}.hostPort", port.get("hostPort"), (None, 0))


def host_of_probes_and_hooks(pod: Pod) -> Iterator[str]:
    for path, container in pod.containers():
        handlers = [(field, mapping(container, field)) for field in PROBES]
        hooks = mapping(container, "lifecycle")
        handlers += [(f"lifecycle.{hook}", mapping(hooks, hook)) for hook in ("postStart", "preStop")]
        for field, handler in handlers:
            for kind in ("httpGet", "tcpSocket"):
                host = mapping(handler, kind).get("host")
                yield from _refuse(pod, f"{path}.{field}.{kind}.host", host, (None, ""))


def apparmor(pod: Pod) -> Iterator[str]:
    for path, context in _contexts(pod):
        profile = mapping(context, "appArmorProfile").get("type")
        yield from _refuse(pod, f"{path}.appArmorProfile.type", profile, _APPARMOR)
    for key, value in pod.annotations.items():
        if key.startswith(_APPARMOR_ANNOTATION) and not str(value).startswith("localhost/"):
            path = pod.path.removesuffix("spec") + f"metadata.annotations.{key}"
            yield from _refuse(pod, path, value, ("runtime/default",))


def selinux(pod: Pod) -> Iterator[str]:
    for path, context in _contexts(pod):
        options = mapping(context, "seLinuxOptions")
        yield from _refuse(pod, f"{path}.seLinuxOptions.type", options.get("type"), _SELINUX_TYPES)
        for field in ("user", "role"):
            yield from _refuse(pod, f"{path}.seLinuxOptions.{field}", options.get(field), (None, ""))


def proc_mount(pod: Pod) -> Iterator[str]:
    for path, context in _container_contexts(pod):
        yield from _refuse(pod, f"{path}.procMount", context.get("procMount"), (None, "Default"))


def sysctls(pod: Pod) -> Iterator[str]:
    context = mapping(pod.spec, "securityContext")
    for path, sysctl in listed(context, "sysctls", f"{pod.path}.securityContext"):
        if sysctl.get("name") not in SAFE_SYSCTLS:
            right = f"restricted allows {', '.join(sorted(SAFE_SYSCTLS))}"
            yield pod.wrong(f"{path}.name", sysctl.get("name"), right)


# Restricted


def volume_types(pod: Pod) -> Iterator[str]:
    """Baseline's ban on hostPath is in it."""
    for path, volume in listed(pod.spec, "volumes", pod.path):
        kinds = sorted(key for key in volume if key != "name")
        if not kinds or not VOLUME_TYPES.issuperset(kinds):
            right = f"restricted allows {', '.join(sorted(VOLUME_TYPES))}"
            yield pod.wrong(path, ", ".join(kinds) or None, right)


def privilege_escalation(pod: Pod) -> Iterator[str]:
    for path, context in _container_contexts(pod):
        value = context.get("allowPrivilegeEscalation")
        yield from _refuse(pod, f"{path}.allowPrivilegeEscalation", value, (False,))


def run_as_non_root(pod: Pod) -> Iterator[str]:
    yield from _inherited(pod, ("runAsNonRoot",), (True,))


def run_as_user(pod: Pod) -> Iterator[str]:
    for path, context in _contexts(pod):
        if context.get("runAsUser") == 0:
            yield pod.wrong(f"{path}.runAsUser", 0, "restricted allows every user but 0 (root), or no value")


def seccomp(pod: Pod) -> Iterator[str]:
    yield from _inherited(pod, ("seccompProfile", "type"), _SECCOMP)


def capabilities(pod: Pod) -> Iterator[str]:
    for path, context in _container_contexts(pod):
        sets = mapping(context, "capabilities")
        dropped = sets.get("drop")
        if not isinstance(dropped, list) or "ALL" not in dropped:
            yield pod.wrong(f"{path}.capabilities.drop", dropped, "restricted wants ALL in it")
        for capability in sets.get("add") or []:
            yield from _refuse(pod, f"{path}.capabilities.add", capability, ("NET_BIND_SERVICE",))


RULES: tuple[Rule, ...] = (
    host_namespaces,
    windows_host_process,
    privileged,
    host_ports,
    host_of_probes_and_hooks,
    apparmor,
    selinux,
    proc_mount,
    sysctls,
    volume_types,
    privilege_escalation,
    run_as_non_root,
    run_as_user,
    seccomp,
    capabilities,
)


# What rules share


def _container_contexts(pod: Pod) -> Iterator[tuple[str, Json]]:
    for path, container in pod.containers():
        yield f"{path}.securityContext", mapping(container, "securityContext")


def _contexts(pod: Pod) -> Iterator[tuple[str, Json]]:
    """The pod's own security context, and those of its containers."""
    yield f"{pod.path}.securityContext", mapping(pod.spec, "securityContext")
    yield from _container_contexts(pod)


def _inherited(pod: Pod, steps: tuple[str, ...], allowed: _Allowed) -> Iterator[str]:
    """What the pod says holds for the containers that say nothing; one of the two has to say it."""
    (pod_path, own), *containers = _contexts(pod)
    field, of_pod = ".".join(steps), _at(own, steps)
    yield from _refuse(pod, f"{pod_path}.{field}", of_pod, (None, *allowed))
    for path, context in containers:
        value = _at(context, steps)
        yield from _refuse(pod, f"{path}.{field}", value, allowed if of_pod is None else (None, *allowed))


def _at(node: Mapping[str, Any], steps: tuple[str, ...]) -> Any:
    return mapping(node, *steps[:-1]).get(steps[-1])


def _refuse(pod: Pod, path: str, value: object, allowed: _Allowed) -> Iterator[str]:
    if not any(value == word and type(value) is type(word) for word in allowed):
        words = " or ".join("no value" if word is None else json.dumps(word) for word in allowed)
        yield pod.wrong(path, value, f"restricted allows {words}")
