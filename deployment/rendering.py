"""The chart as Helm renders it: what `make chart` and the tests look at."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deployment import ROOT
from deployment.outcome import Failed

CHART = ROOT / "helm"
# The three newest minor versions of Kubernetes; the chart supports them, and they are what it is checked for.
KUBERNETES = ("1.35", "1.36", "1.37")
RELEASE = "test"
CLUSTER_HAS = "# The cluster has: "

Document = dict[str, Any]


class Refused(Failed):
    """Helm did not render; the message is what it said."""


def render(
    helm: Path,
    files: Sequence[Path] = (),
    values: Mapping[str, Any] | None = None,
    kubernetes: str = KUBERNETES[-1],
    chart: Path = CHART,
) -> str:
    """Every manifest of the release as one text: values of `files` in their order, and `values` over them.

    Raises Refused where the schema, a `fail` or Helm itself does not accept them.
    """
    command = [str(helm), "template", RELEASE, str(chart), "--namespace", "models"]
    command += ["--kube-version", kubernetes, *(word for file in files for word in ("--values", str(file)))]
    if values is not None:
        command += ["--values", "-"]
    typed: str | None = None if values is None else yaml.safe_dump(dict(values), allow_unicode=True)
    run = subprocess.run(command, input=typed, capture_output=True, text=True)
    if run.returncode:
        raise Refused(run.stderr.strip())
    return run.stdout


def documents(rendered: str) -> list[Document]:
    return [document for document in yaml.safe_load_all(rendered) if document]


def values_files(chart: Path = CHART) -> list[Path]:
    """The sets of values that the chart is checked with."""
    return sorted((chart / "ci").glob("*-values.yaml"))


def cluster_has(file: Path) -> list[str]:
    """What a set of values takes for granted in the cluster, as "Kind name": its comment says so."""
    lines = file.read_text(encoding="utf-8").splitlines()
    told = [line.removeprefix(CLUSTER_HAS) for line in lines if line.startswith(CLUSTER_HAS)]
    return [item.strip() for line in told for item in line.split(",")]
