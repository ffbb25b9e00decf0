"""Mounts and volumes: each has the other, one source, a path of its own; /tmp can be written."""

from __future__ import annotations

from collections.abc import Iterator

from deployment.manifests.containers import one_of
from deployment.manifests.objects import Json, Objects, Pod, listed, mapping, title, wrong

_ACCESS_MODES = ("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod")
_ONE_NODE = {"ReadWriteOnce", "ReadWriteOncePod"}
_WRITABLE = ("emptyDir", "ephemeral", "persistentVolumeClaim")
_HIGHEST_MODE = 0o777


def check(objects: Objects) -> Iterator[str]:
    for pod in objects.pods:
        yield from _mounts(pod)
        yield from _volumes(pod)
        for path, container in pod.containers():
            yield from _temporary_files(pod, path, container)
        yield from _shared_by_replicas(objects, pod)
    for claim in objects.of("PersistentVolumeClaim"):
        yield from _claim(claim)


def _mounts(pod: Pod) -> Iterator[str]:
    volumes = {volume.get("name") for _, volume in listed(pod.spec, "volumes")}
    for path, container in pod.containers():
        taken = set()
        for mount_path, mount in listed(container, "volumeMounts", path):
            own, place = mount.get("name"), mount.get("mountPath")
            if own not in volumes:
                there = ", ".join(sorted(map(str, volumes))) or "none"
                yield pod.wrong(f"{mount_path}.name", own, f"the pod has no such volume; it has {there}")
            if not isinstance(place, str) or not place.startswith("/") or ":" in place:
                yield pod.wrong(f"{mount_path}.mountPath", place, "it is an absolute path without a colon")
            if place in taken:
                yield pod.wrong(f"{mount_path}.mountPath", place, "another volume is mounted there")
            taken.add(place)
            part = str(mount.get("subPath", ""))
            if part.startswith("/") or ".." in part.split("/"):
                yield pod.wrong(f"{mount_path}.subPath", part, "it is a relative path without ..")


def _volumes(pod: Pod) -> Iterator[str]:
    mounted = {
        mount.get("name")
        for _, container in pod.containers()
        for key in ("volumeMounts", "volumeDevices")
        for _, mount in listed(container, key)
    }
    for path, volume in listed(pod.spec, "volumes", pod.path):
        if volume.get("name") not in mounted:
            yield pod.wrong(f"{path}.name", volume.get("name"), "no container mounts this volume")
        sources = sorted(key for key in volume if key != "name")
        if len(sources) != 1:
            yield pod.wrong(path, sources, "a volume has exactly one source")
        for field in ("configMap", "secret", "projected", "downwardAPI"):
            yield from _modes(pod, f"{path}.{field}", mapping(volume, field))


def _modes(pod: Pod, path: str, files: Json) -> Iterator[str]:
    modes = [(f"{path}.defaultMode", files.get("defaultMode"))]
    modes += [(f"{item_path}.mode", item.get("mode")) for item_path, item in listed(files, "items", path)]
    for mode_path, mode in modes:
        if mode is not None and (not isinstance(mode, int) or not 0 <= mode <= _HIGHEST_MODE):
            yield pod.wrong(mode_path, mode, "a mode is 0 to 0777, in decimal 0 to 511")


def _temporary_files(pod: Pod, path: str, container: Json) -> Iterator[str]:
    """HOME is /tmp here, and Python, torch and tokenizers write there: a read-only root needs a volume."""
    if not mapping(container, "securityContext").get("readOnlyRootFilesystem"):
        return
    sources = {volume.get("name"): volume for _, volume in listed(pod.spec, "volumes")}
    for _, mount in listed(container, "volumeMounts"):
        is_writable = not mount.get("readOnly") and any(
            key in sources.get(mount.get("name"), {}) for key in _WRITABLE
        )
        if str(mount.get("mountPath")).rstrip("/") == "/tmp" and is_writable:  # noqa: S108 - a path in the container
            return
    field = f"{path}.securityContext.readOnlyRootFilesystem"
    yield pod.wrong(field, True, "the container needs a writable volume at /tmp, such as an emptyDir")


# Claims


def _claim(claim: Json) -> Iterator[str]:
    spec = mapping(claim, "spec")
    modes = spec.get("accessModes") or None
    if not isinstance(modes, list) or not set(modes) <= set(_ACCESS_MODES):
        yield wrong(claim, "spec.accessModes", modes, f"it lists some of {', '.join(_ACCESS_MODES)}")
    if "storage" not in mapping(spec, "resources", "requests"):
        yield wrong(claim, "spec.resources.requests.storage", None, "a claim says how much it needs")
    for field, value, right in one_of(spec, {"volumeMode": ("Filesystem", "Block")}):
        yield wrong(claim, f"spec.{field}", value, right)


def _shared_by_replicas(objects: Objects, pod: Pod) -> Iterator[str]:
    """A claim of one node holds up every pod that the scheduler puts on another."""
    if pod.owner.get("kind") != "Deployment" or (reason := _several(objects, pod.owner)) is None:
        return
    for path, volume in listed(pod.spec, "volumes", pod.path):
        own = mapping(volume, "persistentVolumeClaim").get("claimName")
        claim = objects.find("PersistentVolumeClaim", str(own), near=pod.owner)
        modes = mapping(claim, "spec").get("accessModes", [])
        if modes and set(modes) <= _ONE_NODE:
            right = f"its access modes are {', '.join(modes)}, for one node; {reason}"
            yield pod.wrong(f"{path}.persistentVolumeClaim.claimName", own, right)


def _several(objects: Objects, deployment: Json) -> str | None:
    """Why several of a Deployment's pods may live at the same time; None where they cannot."""
    replicas, scalers = mapping(deployment, "spec").get("replicas", 1), list(objects.autoscalers(deployment))
    if scalers:
        return f"{title(scalers[0])} makes several pods"
    if isinstance(replicas, int) and replicas > 1:
        return f"spec.replicas is {replicas}"
    strategy = mapping(deployment, "spec", "strategy")
    surge = mapping(strategy, "rollingUpdate").get("maxSurge", "25%")
    if strategy.get("type", "RollingUpdate") == "RollingUpdate" and str(surge) not in ("0", "0%"):
        return f"a rollout with maxSurge {surge} starts the new pod beside the old"
    return None
