"""The chart as Helm renders it: what `make chart` and the tests look at."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from deployment import ROOT
from deployment.outcome import Failed

CHART = ROOT / "helm"
# The oldest minor version of Kubernetes that Chart.yaml takes, and the three newest: the chart is checked for
# them.
KUBERNETES = ("1.31", "1.35", "1.36", "1.37")
RELEASE = "test"
CLUSTER_HAS = "# The cluster has: "
FROM = "# From Kubernetes "

Document = dict[str, Any]


class Refused(Failed):
    """Helm did not render; the message is what it said."""


class _AsGo(yaml.SafeLoader):
    """YAML as Helm and the API server read it, in Go: 1e3 is a number there, and y a truth.

    Each key of a map has to be there once: of two the server takes one and says nothing.
    """

    bool_values: ClassVar[dict[str, bool]] = {**yaml.SafeLoader.bool_values, "y": True, "n": False}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise Failed(f"line {key.start_mark.line + 1}: the key {key.value} is there twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_AsGo.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)
_AsGo.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"[yYnN]$"), list("yYnN"))


def render(
    helm: Path,
    files: Sequence[Path] = (),
    values: Mapping[str, Any] | None = None,
    kubernetes: str = KUBERNETES[-1],
    chart: Path = CHART,
    release: str = RELEASE,
) -> str:
    """Every manifest of the release as one text: values of `files` in their order, and `values` over them.

    Raises Refused where the schema, a `fail` or Helm itself does not accept them.
    """
    command = [str(helm), "template", release, str(chart), "--namespace", "models"]
    command += ["--kube-version", kubernetes, *(word for file in files for word in ("--values", str(file)))]
    if values is not None:
        command += ["--values", "-"]
    typed: str | None = None if values is None else yaml.safe_dump(dict(values), allow_unicode=True)
    run = subprocess.run(command, input=typed, capture_output=True, text=True)
    if run.returncode:
        raise Refused(run.stderr.strip())
    return run.stdout


def notes(helm: Path, values: Mapping[str, Any]) -> str:
    """What `helm install` tells when it is done. Helm 3 asks a cluster even for that; Helm 4 does not."""
    command = [str(helm), "install", RELEASE, str(CHART), "--namespace", "models", "--dry-run=client"]
    typed = yaml.safe_dump(dict(values))
    run = subprocess.run([*command, "--values", "-"], input=typed, capture_output=True, text=True)
    if run.returncode:
        raise Refused(run.stderr.strip())
    return run.stdout.partition("\nNOTES:\n")[2]


def documents(rendered: str) -> list[Document]:
    """Raises Failed where a map has a key twice."""
    return [document for document in yaml.load_all(rendered, _AsGo) if document]


def values_files(kubernetes: str | None = None) -> list[Path]:
    """The sets of values that the chart is checked with; for a version of Kubernetes those that it takes."""
    files = sorted((CHART / "ci").glob("*-values.yaml"))
    return [file for file in files if kubernetes is None or _minor(kubernetes) >= _minor(oldest_for(file))]


def oldest_for(file: Path) -> str:
    """The version of Kubernetes from which on a set of values is taken: its comment says so, or every one."""
    lines = file.read_text(encoding="utf-8").splitlines()
    told = (line.removeprefix(FROM).split()[0] for line in lines if line.startswith(FROM))
    return next(told, KUBERNETES[0])


def _minor(version: str) -> int:
    return int(version.split(".")[1])


def cluster_has(file: Path) -> list[str]:
    """What a set of values takes for granted in the cluster, as "Kind name": its comment says so."""
    lines = file.read_text(encoding="utf-8").splitlines()
    told = [line.removeprefix(CLUSTER_HAS) for line in lines if line.startswith(CLUSTER_HAS)]
    return [item.strip() for line in told for item in line.split(",")]
