"""Rendered manifests as objects that can be found, and the pods that they describe."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
Check = Callable[["Objects"], Iterator[str]]

# Where the pod of each kind stands: the path to the object that has `metadata` and `spec`.
_TEMPLATES = {
    "Pod": (),
    "Deployment": ("spec", "template"),
    "ReplicaSet": ("spec", "template"),
    "StatefulSet": ("spec", "template"),
    "DaemonSet": ("spec", "template"),
    "Job": ("spec", "template"),
    "CronJob": ("spec", "jobTemplate", "spec", "template"),
}
CONTAINERS = ("initContainers", "containers", "ephemeralContainers")


def group(document: Mapping[str, Any]) -> str:
    """ "apps" of apps/v1; "" of v1."""
    version = str(document.get("apiVersion", ""))
    return version.rpartition("/")[0]


def name(document: Mapping[str, Any]) -> str:
    return str(mapping(document, "metadata").get("name", ""))


def namespace(document: Mapping[str, Any]) -> str:
    return str(mapping(document, "metadata").get("namespace", ""))


def title(document: Mapping[str, Any]) -> str:
    """What sentences call an object: "Deployment web"."""
    return f"{document.get('kind', 'object without a kind')} {name(document)}".rstrip()


def wrong(document: Mapping[str, Any], path: str, value: object, right: str) -> str:
    """The sentence of one problem: object, field, value, and what is right."""
    said = "not set" if value is None else json.dumps(value, default=str, ensure_ascii=False)
    return f"{title(document)}: {path} is {said}; {right}"


def mapping(node: object, *path: str) -> Json:
    """The mapping at `path` under `node`; empty where there is none, or something else."""
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return dict(node) if isinstance(node, Mapping) else {}


def listed(node: Mapping[str, Any], key: str, path: str = "") -> Iterator[tuple[str, Json]]:
    """The mappings in the list `node[key]`, each with its path: "spec.ports[0]"."""
    value = node.get(key)
    prefix = f"{path}.{key}" if path else key
    for index, item in enumerate(value if isinstance(value, Sequence) and not isinstance(value, str) else ()):
        if isinstance(item, Mapping):
            yield f"{prefix}[{index}]", dict(item)


@dataclass(frozen=True)
class Pod:
    """A pod as `owner` describes it. `path` leads to its spec: "spec.template.spec"."""

    owner: Json
    path: str
    labels: Json
    annotations: Json
    spec: Json

    def containers(self, *lists: str) -> Iterator[tuple[str, Json]]:
        """(path, container) of the given lists, by default of all."""
        for key in lists or CONTAINERS:
            yield from listed(self.spec, key, self.path)

    def long_running(self) -> Iterator[tuple[str, Json]]:
        """Containers that live side by side: the main ones, and init containers that stay as sidecars."""
        yield from self.containers("containers")
        for path, container in self.containers("initContainers"):
            if container.get("restartPolicy") == "Always":
                yield path, container

    def ports(self) -> Iterator[tuple[str, Json]]:
        for path, container in self.long_running():
            yield from listed(container, "ports", path)

    def wrong(self, path: str, value: object, right: str) -> str:
        return wrong(self.owner, path, value, right)


class Objects:
    """All documents of one release. Objects refer to those of their own namespace.

    `elsewhere` names what the cluster has and the release has not: "Secret api-keys".
    """

    def __init__(self, documents: Sequence[Json], elsewhere: Collection[str] = ()) -> None:
        self.documents = [document for document in documents if document]
        self.pods = [pod for document in self.documents if (pod := _pod(document))]
        self._elsewhere = frozenset(elsewhere)
        self._index = {(str(d.get("kind")), namespace(d), name(d)): d for d in self.documents}

    def of(self, *kinds: str) -> Iterator[Json]:
        return (document for document in self.documents if document.get("kind") in kinds)

    def find(self, kind: str, name: str, near: Json) -> Json | None:
        """The rendered object in the namespace of `near`."""
        return self._index.get((kind, namespace(near), name))

    def is_elsewhere(self, kind: str, name: str) -> bool:
        return f"{kind} {name}" in self._elsewhere

    def selected(self, selector: Mapping[str, Any], near: Json) -> list[Pod]:
        """The pods in the namespace of `near` that a label selector takes."""
        there = (pod for pod in self.pods if namespace(pod.owner) == namespace(near))
        return [pod for pod in there if matches(selector, pod.labels)]

    def autoscalers(self, target: Json) -> Iterator[Json]:
        """Everything that scales `target`: HorizontalPodAutoscalers and KEDA's ScaledObjects."""
        for scaler in self.of("HorizontalPodAutoscaler", "ScaledObject"):
            if self.find(*scale_target(scaler), near=scaler) is target:
                yield scaler


def scale_target(scaler: Json) -> tuple[str, str]:
    """(kind, name) that an autoscaler scales; KEDA's default kind is Deployment."""
    reference = mapping(scaler, "spec", "scaleTargetRef")
    return str(reference.get("kind", "Deployment")), str(reference.get("name", ""))


def matches(selector: Mapping[str, Any], labels: Mapping[str, Any]) -> bool:
    """A LabelSelector (matchLabels, matchExpressions); an empty one takes everything."""
    exact = all(labels.get(key) == value for key, value in mapping(selector, "matchLabels").items())
    return exact and all(_expression(rule, labels) for _, rule in listed(dict(selector), "matchExpressions"))


def _expression(rule: Json, labels: Mapping[str, Any]) -> bool:
    value, values = labels.get(str(rule.get("key"))), rule.get("values") or []
    results = {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }
    return results.get(str(rule.get("operator")), False)


def _pod(document: Json) -> Pod | None:
    steps = _TEMPLATES.get(str(document.get("kind")))
    if steps is None:
        return None
    template = mapping(document, *steps)
    metadata = mapping(template, "metadata")
    return Pod(
        owner=document,
        path=".".join((*steps, "spec")),
        labels=mapping(metadata, "labels"),
        annotations=mapping(metadata, "annotations"),
        spec=mapping(template, "spec"),
    )
