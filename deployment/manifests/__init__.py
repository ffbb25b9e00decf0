"""Faults in rendered manifests that schemas let pass: wrong units, selectors, mounts, ports, references.

Written from the Kubernetes API's own validation and from how its parts work together. What a schema finds
(unknown fields, types, what is missing) is left to the schema.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from deployment.manifests import (
    containers,
    names,
    product,
    quantities,
    references,
    scaling,
    traffic,
    volumes,
    workloads,
)
from deployment.manifests.objects import Check, Json, Objects

_PARTS = (names, quantities, containers, volumes, references, workloads, traffic, scaling, product)


def problems(documents: Sequence[Json], elsewhere: Collection[str] = ()) -> list[str]:
    """A sentence for each fault: object, field, value, and what is right. None: an empty list.

    The documents are those of one release. What the cluster has besides, and they refer to, is named in
    `elsewhere` as "Kind name".
    """
    objects = Objects(documents, elsewhere)
    return [sentence for part in _PARTS for sentence in _found_by(part.check, objects)]


def _found_by(check: Check, objects: Objects) -> list[str]:
    """A list where a text belongs, or the like, is for schemas to find; here it must not hide the rest."""
    found: list[str] = []
    try:
        found.extend(check(objects))
    except TypeError as err:
        found.append(f"{check.__module__} stopped at a value of the wrong type ({err}): a schema tells which")
    return found
