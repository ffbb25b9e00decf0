"""What a pod takes from other objects: they are there, with the keys that it wants."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deployment.manifests.objects import Json, Objects, Pod, listed, mapping


@dataclass(frozen=True)
class Reference:
    """The field at `path` names an object; `keys` of it have to be there."""

    path: str
    kind: str
    name: str
    keys: tuple[str, ...] = ()


def check(objects: Objects) -> Iterator[str]:
    for pod in objects.pods:
        for reference in references(pod):
            yield from _missing(objects, pod, reference)


def references(pod: Pod) -> Iterator[Reference]:
    account = pod.spec.get("serviceAccountName")
    if account and account != "default":
        yield Reference(f"{pod.path}.serviceAccountName", "ServiceAccount", str(account))
    for path, secret in listed(pod.spec, "imagePullSecrets", pod.path):
        yield Reference(f"{path}.name", "Secret", str(secret.get("name")))
    for path, container in pod.containers():
        yield from _environment(path, container)
    for path, volume in listed(pod.spec, "volumes", pod.path):
        yield from _volume(path, volume)


def _missing(objects: Objects, pod: Pod, wanted: Reference) -> Iterator[str]:
    if objects.is_elsewhere(wanted.kind, wanted.name):
        return
    found = objects.find(wanted.kind, wanted.name, near=pod.owner)
    if found is None:
        yield pod.wrong(wanted.path, wanted.name, f"there is no such {wanted.kind}")
        return
    held = {key for field in ("data", "binaryData", "stringData") for key in mapping(found, field)}
    for key in wanted.keys:
        if key not in held:
            has = ", ".join(sorted(held)) or "none"
            yield pod.wrong(wanted.path, wanted.name, f"this {wanted.kind} has no key {key}; it has {has}")


def _environment(path: str, container: Json) -> Iterator[Reference]:
    for env_path, variable in listed(container, "env", path):
        for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
            source = mapping(variable, "valueFrom", field)
            if source and not source.get("optional"):
                place, keys = f"{env_path}.valueFrom.{field}.name", (str(source.get("key")),)
                yield Reference(place, kind, str(source.get("name")), keys)
    for env_path, source in listed(container, "envFrom", path):
        for field, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
            named = mapping(source, field)
            if named and not named.get("optional"):
                yield Reference(f"{env_path}.{field}.name", kind, str(named.get("name")))


def _volume(path: str, volume: Json) -> Iterator[Reference]:
    claim = mapping(volume, "persistentVolumeClaim")
    if claim:
        place = f"{path}.persistentVolumeClaim.claimName"
        yield Reference(place, "PersistentVolumeClaim", str(claim.get("claimName")))
    yield from _files(path, volume, secret_name="secretName")  # noqa: S106 - the name of a field
    for source_path, source in listed(mapping(volume, "projected"), "sources", f"{path}.projected"):
        yield from _files(source_path, source, secret_name="name")  # noqa: S106


def _files(path: str, source: Json, secret_name: str) -> Iterator[Reference]:
    for field, kind, naming in (("configMap", "ConfigMap", "name"), ("secret", "Secret", secret_name)):
        files = mapping(source, field)
        if files and not files.get("optional"):
            keys = tuple(str(item.get("key")) for _, item in listed(files, "items"))
            yield Reference(f"{path}.{field}.{naming}", kind, str(files.get(naming)), keys)
