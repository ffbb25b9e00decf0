"""Names, labels and keys, in the forms that the API server accepts; no two objects of the same name."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator, Mapping
from typing import Any

from deployment.manifests.objects import (
    CONTAINERS,
    Json,
    Objects,
    group,
    listed,
    mapping,
    name,
    namespace,
    title,
    wrong,
)

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SERVICE = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_LABEL_TEXT = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_DATA_KEY = re.compile(r"[-._a-zA-Z0-9]+")
_PORT_NAME = re.compile(r"(?!.*--)(?=.*[a-z])[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_IMAGE_PART = r"[a-z0-9]+([._-]+[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"([a-zA-Z0-9][-a-zA-Z0-9.]*(:\d+)?/)?{_IMAGE_PART}(/{_IMAGE_PART})*(:\w[\w.-]{{0,127}})?(@[a-z0-9]+:[0-9a-f]{{32,}})?"
)
# The names of pods and their labels are made from these.
_LENGTHS = {"Service": 63, "Job": 63, "CronJob": 52, "StatefulSet": 52, "Namespace": 63}


def check(objects: Objects) -> Iterator[str]:
    yield from _duplicates(objects)
    for document in objects.documents:
        yield from _name(document)
        yield from _metadata(document, "metadata", mapping(document, "metadata"))
    for pod in objects.pods:
        if pod.path != "spec":
            labels = {"labels": pod.labels, "annotations": pod.annotations}
            yield from _metadata(pod.owner, pod.path.removesuffix("spec") + "metadata", labels)
        yield from _parts(pod.owner, pod.path, pod.spec)
    for document in objects.of("ConfigMap", "Secret"):
        yield from _data_keys(document)


def is_label(text: object) -> bool:
    return _fits(_LABEL, text, 63)


def is_port_name(text: object) -> bool:
    return _fits(_PORT_NAME, text, 15)


def _fits(form: re.Pattern[str], text: object, length: int) -> bool:
    return isinstance(text, str) and len(text) <= length and form.fullmatch(text) is not None


def _duplicates(objects: Objects) -> Iterator[str]:
    seen = set()
    for document in objects.documents:
        key = (group(document), document.get("kind"), namespace(document), name(document))
        if key in seen:
            yield wrong(document, "metadata.name", name(document), "another object has this kind and name")
        seen.add(key)


def _name(document: Json) -> Iterator[str]:
    kind = str(document.get("kind"))
    form = _SERVICE if kind == "Service" else _SUBDOMAIN
    length, own = _LENGTHS.get(kind, 253), mapping(document, "metadata").get("name")
    if not _fits(form, own, length):
        first = "a letter first" if form is _SERVICE else "a letter or digit first"
        right = f"it has up to {length} of a-z, 0-9 and -, with {first} and no - at the end"
        yield wrong(document, "metadata.name", own, right)


def _metadata(document: Json, path: str, metadata: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("labels", "annotations"):
        for key, value in mapping(metadata, kind).items():
            yield from _key(document, f"{path}.{kind}", str(key))
            if not isinstance(value, str):
                yield wrong(document, f"{path}.{kind}.{key}", value, "it has to be text: quote it")
            elif kind == "labels" and not _fits(_LABEL_TEXT, value, 63):
                right = (
                    "a label has up to 63 letters, digits, -, _ and ., with a letter or digit at both ends"
                )
                yield wrong(document, f"{path}.labels.{key}", value, right)


def _key(document: Json, path: str, key: str) -> Iterator[str]:
    prefix, slash, own = key.rpartition("/")
    if not own or not _fits(_LABEL_TEXT, own, 63) or (slash and not _fits(_SUBDOMAIN, prefix, 253)):
        right = "a key is NAME or DNS.NAME/NAME, with up to 63 letters, digits, -, _ and . in NAME"
        yield f"{title(document)}: {path} has the key {key!r}; {right}"


def _parts(owner: Json, path: str, spec: Json) -> Iterator[str]:
    """The names of containers and volumes, and the images."""
    for lists in (CONTAINERS, ("volumes",)):
        seen = set()
        for part_path, part in (found for key in lists for found in listed(spec, key, path)):
            own = part.get("name")
            if not is_label(own):
                yield wrong(owner, f"{part_path}.name", own, "it has up to 63 of a-z, 0-9 and -")
            if own in seen:
                what = "volume" if lists is not CONTAINERS else "container"
                yield wrong(owner, f"{part_path}.name", own, f"another {what} of the pod has this name")
            seen.add(own)
            if lists is CONTAINERS and not _fits(_IMAGE, part.get("image"), 500):
                right = "an image is NAME, NAME:TAG or NAME@DIGEST"
                yield wrong(owner, f"{part_path}.image", part.get("image"), right)


def _data_keys(document: Json) -> Iterator[str]:
    """Of a Secret no value is shown."""
    is_secret = document.get("kind") == "Secret"
    for field in ("data", "binaryData", "stringData"):
        for key, value in mapping(document, field).items():
            if not _fits(_DATA_KEY, key, 253):
                right = "a key is a file name of letters, digits, -, _ and ."
                yield f"{title(document)}: {field} has the key {key!r}; {right}"
            if not isinstance(value, str):
                shown = "…" if is_secret else value
                yield wrong(document, f"{field}.{key}", shown, "it has to be text: quote it")
            elif (field == "binaryData" or (is_secret and field == "data")) and not _is_base64(value):
                yield wrong(document, f"{field}.{key}", "…", "it has to be base64; plain text is stringData")


def _is_base64(text: str) -> bool:
    try:
        b64decode(text, validate=True)
    except ValueError:
        return False
    return True
