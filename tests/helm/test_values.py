"""values.yaml, its schema, and what Helm makes of them."""

import re
import tomllib

import pytest
import yaml

from deployment import manifests, policies
from deployment.chart import as_said, asked_as, refused
from deployment.chart_readme import schema_of, walk
from deployment.rendering import (
    CHART,
    KUBERNETES,
    Refused,
    cluster_has,
    documents,
    oldest_for,
    render,
    values_files,
)

VALUES = (CHART / "values.yaml").read_text(encoding="utf-8")
# Maps of which values.yaml shows only what is set.
PARTLY_THERE = {
    ("config",), ("exporter", "spec"), ("startupProbe",), ("readinessProbe",), ("livenessProbe",),
}  # fmt: skip
TEMPLATES = "\n".join(
    path.read_text(encoding="utf-8") for path in (CHART / "templates").rglob("*") if path.is_file()
)
# Maps that templates take as they are, by other names than `.Values.…`, or whole.
TAKEN_WHOLE = {
    "config", "image", "exporterImage", "exporter.resources", "resources",
    "startupProbe", "readinessProbe", "livenessProbe",
}  # fmt: skip


@pytest.mark.parametrize("file", values_files(), ids=lambda file: file.stem)
def test_helm_3_and_helm_4_render_alike_and_nothing_is_wrong_with_it(file, helm3, helm):
    rendered = render(helm3, [file])
    assert rendered == render(helm, [file])
    assert manifests.problems(documents(rendered), cluster_has(file)) == []
    assert policies.problems(documents(rendered)) == []


@pytest.mark.parametrize("case", refused(), ids=lambda case: case["why"])
def test_what_does_not_go_together_is_refused_with_the_reason(case, helm):
    with pytest.raises(Refused) as refusal:
        render(helm, values=case["values"], **asked_as(case))
    assert case["says"] in as_said(refusal.value)


@pytest.mark.parametrize("release", ["true", "null", "on", "off"])
def test_a_release_may_have_a_name_that_yaml_takes_for_something_else(helm, release):
    """Of such a release the chart makes true-snugfit, which is text; the overrides are not lengthened."""
    found = documents(
        render(helm, values={"fullnameOverride": release, "nameOverride": release}, release=release)
    )
    assert manifests.problems(found) == []
    (service,) = (document for document in found if document["kind"] == "Service")
    assert service["metadata"]["name"] == service["spec"]["selector"]["app.kubernetes.io/instance"] == release


@pytest.mark.parametrize("release", ["123", "1e3", "llm.v2", "y"])
def test_a_release_whose_name_no_service_can_have_is_given_another_for_it(helm, release):
    found = documents(render(helm, values={"fullnameOverride": "llm"}, release=release))
    assert manifests.problems(found) == []
    (service,) = (document for document in found if document["kind"] == "Service")
    assert service["spec"]["selector"]["app.kubernetes.io/instance"] == release


@pytest.mark.parametrize("name", ["x" * 39 + "-y", "x" * 39 + "--"])
def test_a_name_that_is_cut_ends_with_a_letter_or_digit(chart, name):
    assert chart({"fullnameOverride": name.rstrip("-") + "-z"}).one("Service")["metadata"]["name"] == "x" * 39


def test_sets_of_values_that_an_old_kubernetes_is_spared_are_refused_there(helm):
    spared = set(values_files()) - set(values_files(KUBERNETES[0]))
    assert {file.name for file in spared} == {"image-volume-values.yaml"}
    for file in spared:
        with pytest.raises(Refused, match=rf"from Kubernetes {oldest_for(file)}"):
            render(helm, [file], kubernetes=KUBERNETES[0])


def test_all_problems_are_told_at_once(helm):
    values = {"config": {"api_key": ["k"]}, "ingress": {"enabled": True}, "gateway": {"enabled": True}}
    with pytest.raises(Refused, match=r"(?s)apiKeys.*ingress.hosts.*gateway.parentRefs"):
        render(helm, values=values)


def values_of_the_chart(schema):
    """Every value that is no map of further values."""
    return [value for value in walk(VALUES, schema) if not value.default or not is_closed(value.path, schema)]


def is_closed(path, schema):
    return schema_of(path, schema).get("additionalProperties") is False


def test_every_value_is_in_the_schema_and_every_one_of_the_schema_is_there(schema):
    assert list(missing(yaml.safe_load(VALUES), schema, schema)) == []


def missing(values, part, schema, path=()):
    """Names that only one of the two has, where the schema names all that may be there."""
    names = part["properties"].keys() - {"global"}
    optional = path in PARTLY_THERE
    yield from (".".join((*path, name)) for name in values.keys() ^ names if not optional or name in values)
    for name, value in values.items():
        if isinstance(value, dict) and is_closed((*path, name), schema):
            yield from missing(value, schema_of((*path, name), schema), schema, (*path, name))


def test_no_map_of_the_schema_takes_any_name_but_those_that_users_fill(schema):
    parts = {".".join(value.path): schema_of(value.path, schema) for value in values_of_the_chart(schema)}
    free = {name for name, part in parts.items() if part.get("type") == "object" and len(part) == 1}
    assert free == {
        "affinity", "autoscaling.behavior", "persistence.dataSource", "podSecurityContext", "securityContext",
    }  # fmt: skip


def test_every_value_is_used_by_a_template(schema):
    names = [".".join(value.path) for value in values_of_the_chart(schema)]
    used = set(re.findall(r"\$?\.Values\.([\w.]+)", TEMPLATES))
    assert used >= TAKEN_WHOLE
    assert [name for name in names if name not in used and not is_part_of(name, TAKEN_WHOLE)] == []


def is_part_of(name, wholes):
    return any(name.startswith(f"{whole}.") for whole in wholes)


def test_the_oldest_kubernetes_that_the_chart_takes_is_one_that_it_is_checked_for():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={KUBERNETES[0]}.0-0"


def test_the_versions_are_those_of_the_package():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = tomllib.loads((CHART.parent / "pyproject.toml").read_text())["project"]
    assert chart["appVersion"] == project["version"]
