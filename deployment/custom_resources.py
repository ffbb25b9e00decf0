"""Custom resources against the types of the projects they belong to; Kubernetes' own schemas lack them.

TypeScript's compiler finds fields that do not exist and wrong types, the validators that come with the types
find values out of range: `deployment.tools.kubernetes_models` has both. KServe's kinds are not among them:
`deployment.kserve` has those. A kind that neither has is a problem too, since nobody has looked at it.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from deployment import kserve
from deployment.manifests.objects import group, title
from deployment.outcome import Failed
from deployment.rendering import Document

MODULES = {
    "HTTPRoute": "@kubernetes-models/gateway-api/gateway.networking.k8s.io/v1/HTTPRoute",
    "ScaledObject": "@kubernetes-models/keda/keda.sh/v1alpha1/ScaledObject",
    "ServiceMonitor": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/ServiceMonitor",
    "PrometheusRule": "@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule",
}
# API groups with a dot in their name that are Kubernetes' own.
_BUILT_IN = {
    f"{name}.k8s.io"
    for name in (
        "admissionregistration",
        "apiextensions",
        "apiregistration",
        "authentication",
        "authorization",
        "certificates",
        "coordination",
        "discovery",
        "events",
        "flowcontrol.apiserver",
        "networking",
        "node",
        "rbac.authorization",
        "resource",
        "scheduling",
        "storage",
    )
}
_COMPILE = ("--noEmit", "--strict", "--skipLibCheck", "--module", "nodenext", "--pretty", "false")
_COMPILER_ENDS = (0, 1, 2)  # the others: errors were found, and it printed them
_ERROR = re.compile(r"[^(]*\((?P<line>\d+),\d+\): error TS\d+: (?P<message>.*)")


def problems(models: Path, documents: Sequence[Document]) -> list[str]:
    """A sentence for each fault of the custom resources among the documents; `models` holds node_modules."""
    known = [document for document in documents if document["kind"] in MODULES]
    found = [*_strangers(documents), *kserve.problems(documents)]
    return found + (_faults(models, known) if known else [])


def _strangers(documents: Sequence[Document]) -> Iterator[str]:
    for document in documents:
        own = group(document)
        is_known = document["kind"] in MODULES or document["kind"] in kserve.KINDS
        if "." in own and own not in _BUILT_IN and not is_known:
            yield f"{title(document)}: it was not checked: there is no schema of {document['apiVersion']}"


def _faults(models: Path, known: Sequence[Document]) -> list[str]:
    with tempfile.TemporaryDirectory(dir=models) as folder:
        types, values = Path(folder, "types.mts"), Path(folder, "values.mjs")
        types.write_text("\n".join(map(_typed, known)), encoding="utf-8")
        values.write_text("\n".join(map(_validated, known)), encoding="utf-8")
        compiler = [str(models / "node_modules" / ".bin" / "tsc"), *_COMPILE, str(types)]
        compiled = _output(compiler, ends_with=_COMPILER_ENDS)
        return [*_compiler_says(compiled, known), *_output(["node", str(values)]).splitlines()]


def _typed(document: Document) -> str:
    """One line, so that the line of an error tells the document."""
    kind = document["kind"]
    return f'({json.dumps(document)}) satisfies import("{MODULES[kind]}").I{kind};'


def _validated(document: Document) -> str:
    kind, text = document["kind"], json.dumps(document)
    return (
        f'try {{ new (await import("{MODULES[kind]}")).{kind}({text}).validate() }} '
        f"catch (err) {{ console.log({json.dumps(title(document))} + ': ' + err.message) }}"
    )


def _compiler_says(output: str, documents: Sequence[Document]) -> Iterator[str]:
    for line in output.splitlines():
        error = _ERROR.match(line)
        where = f"{title(documents[int(error['line']) - 1])}: {error['message']}" if error else line
        if not line.startswith(" "):  # what follows an error explains it at length
            yield where


def _output(command: Sequence[str], ends_with: Sequence[int] = (0,)) -> str:
    """What a program printed. Raises Failed where it did not do its work: silence would pass everything."""
    run = subprocess.run(command, capture_output=True, text=True)
    silent = run.returncode and not run.stdout
    if run.stderr or silent or run.returncode not in ends_with:
        raise Failed(f"{command[0]} ended with {run.returncode}: {run.stderr.strip()}")
    return run.stdout
