import json
import re
from copy import deepcopy
from decimal import Decimal
from pathlib import Path

import pytest
import yaml

from deployment.manifests import problems
from deployment.manifests.objects import matches, title
from deployment.manifests.quantities import parse

FAULTS = yaml.safe_load((Path(__file__).parent / "faults.yaml").read_text())
SHORT = {
    "main": "spec.template.spec.containers[0]",
    "init": "spec.template.spec.initContainers[0]",
    "pod": "spec.template.spec",
}
STEP = re.compile(r'\[(?P<item>[\w+-]+)\]|\["(?P<key>[^"]+)"\]|(?P<name>[^.\[\]]+)')
# No values file of the chart gives these faults a place.
NOT_IN_THE_CHART = {
    "Deployment main.env[NODE_NAME].name",
    "Deployment main.env[NODE_NAME].value",
    "PodDisruptionBudget spec.maxUnavailable",  # of the two it has only this one
    "PodDisruptionBudget spec.minAvailable",
}


class NoPlace(Exception):
    """A set of documents has nothing where a fault would go."""


def seed(documents, fault):
    """Put a fault into the documents; gives the object and the field as sentences write it."""
    kind, field = fault["at"].split(" ", 1)
    head = re.match(r"\w+", field)[0]
    steps = [match.groupdict() for match in STEP.finditer(SHORT.get(head, head) + field[len(head) :])]
    places = []
    for document in documents:
        if document["kind"] == kind and (place := walk(document, steps)):
            places.append((document, *place))
    if not places:
        raise NoPlace(fault["at"])
    document, node, step, shown = next((p for p in places if has(p[1], p[2])), places[0])
    if not has(node, step) and "put" not in fault:
        raise NoPlace(fault["at"])
    change(node, step, fault)
    return document, shown


def walk(node, steps):
    """(parent, last step, the field as it is written), or None where something on the way is missing."""
    shown = ""
    for number, step in enumerate(steps):
        place = step["key"] or step["name"] or index(node, step["item"])
        if place is None:
            return None
        shown += f"[{place}]" if isinstance(node, list) else f".{place}"
        if number == len(steps) - 1:
            return node, place, shown.removeprefix(".")
        if not has(node, place):
            return None
        node = node[place]
    return None


def index(items, item):
    """The place in a list that `item` means: a number, the name of an entry, or + for a new one."""
    if item.isdigit() or item == "+":
        return len(items) if item == "+" else int(item)
    return next((place for place, entry in enumerate(items) if entry.get("name") == item), None)


def has(node, step):
    return 0 <= step < len(node) if isinstance(node, list) else isinstance(node, dict) and step in node


def change(node, step, fault):
    if "put" not in fault:
        del node[step]
    elif isinstance(node, list) and step == len(node):
        node.append(fault["put"])
    else:
        node[step] = fault["put"]


def said(value):
    return "not set" if value is None else json.dumps(value)


def test_a_release_without_a_fault_has_no_problem(good):
    assert problems(good) == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault['at']}={fault.get('put')}"[:70])
def test_a_seeded_fault_is_told_and_nothing_else(good, fault):
    document, field = seed(good, fault)

    expected = fault.get("says") or [
        f"{title(document)}: {field} is {said(fault.get('put'))}; {fault['right']}"
    ]
    assert problems(good) == expected


def test_the_chart_has_no_problem_with_any_of_its_values(rendered):
    assert {name: problems(*release) for name, release in rendered.items()} == {name: [] for name in rendered}


def test_every_fault_is_told_in_what_the_chart_renders(rendered):
    """Of some values one or the other is right: a port, a strategy. There the fault is none."""
    untold = {
        fault["at"] for fault in FAULTS if not any(is_told(fault, *release) for release in rendered.values())
    }
    assert untold == NOT_IN_THE_CHART


def is_told(fault, documents, elsewhere):
    faulty = deepcopy(documents)
    try:
        document, field = seed(faulty, fault)
    except NoPlace:
        return False
    found = problems(faulty, elsewhere)
    return any(sentence.startswith(f"{title(document)}: {field} ") for sentence in found) or (
        "says" in fault and found
    )


# What one changed field does not show


def taken(documents, kind):
    return next(document for document in documents if document["kind"] == kind)


def test_two_objects_of_one_kind_and_name_are_told(good):
    good.append(deepcopy(taken(good, "ServiceAccount")))
    right = "another object has this kind and name"
    assert problems(good) == [f'ServiceAccount snugfit: metadata.name is "snugfit"; {right}']


def test_objects_of_other_namespaces_do_not_count(good):
    taken(good, "Secret")["metadata"]["namespace"] = "other"
    (sentence,) = problems(good)
    assert sentence.endswith('secret.secretName is "snugfit-keys"; there is no such Secret')


def test_what_the_cluster_has_is_not_missed(good):
    good.remove(taken(good, "Secret"))
    assert problems(good, elsewhere={"Secret snugfit-keys"}) == []
    assert len(problems(good)) == 1


def test_optional_references_may_be_missing(good):
    main = taken(good, "Deployment")["spec"]["template"]["spec"]["containers"][0]
    main["envFrom"] = [{"secretRef": {"name": "proxy", "optional": True}}]
    assert problems(good) == []


@pytest.fixture
def with_keda(good):
    good.remove(taken(good, "HorizontalPodAutoscaler"))
    spec = {"scaleTargetRef": {"name": "snugfit"}, "minReplicaCount": 2, "maxReplicaCount": 4}
    good.append({"kind": "ScaledObject", "metadata": {"name": "s"}, "spec": spec})
    return good


def test_keda_may_scale_in_place_of_the_hpa(with_keda):
    assert problems(with_keda) == []


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("scaleTargetRef", {"name": "web"}, 'spec.scaleTargetRef.name is "web"; there is no such Deployment'),
        ("minReplicaCount", 5, "spec.minReplicaCount is 5; it is at most maxReplicaCount, 4"),
    ],
)
def test_faults_of_a_scaled_object_are_told(with_keda, field, value, expected):
    with_keda[-1]["spec"][field] = value
    assert f"ScaledObject s: {expected}" in problems(with_keda)


def test_two_autoscalers_of_one_deployment_are_told(good):
    second = deepcopy(taken(good, "HorizontalPodAutoscaler"))
    second["metadata"]["name"] = "second"
    right = "HorizontalPodAutoscaler snugfit scales it already"
    expected = f'HorizontalPodAutoscaler second: spec.scaleTargetRef.name is "snugfit"; {right}'
    assert problems([*good, second]) == [expected]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"replicas": 2}, "spec.replicas is 2"),
        ({"strategy": {"rollingUpdate": {"maxSurge": 1}}}, "a rollout with maxSurge 1 starts the new pod"),
        ({"strategy": {}}, "a rollout with maxSurge 25% starts the new pod"),
        ({"strategy": {"type": "Recreate"}}, None),
    ],
)
def test_a_volume_of_one_node_holds_one_pod_at_a_time(good, change, reason):
    good.remove(taken(good, "HorizontalPodAutoscaler"))
    good.remove(taken(good, "PodDisruptionBudget"))
    taken(good, "PersistentVolumeClaim")["spec"]["accessModes"] = ["ReadWriteOnce"]
    taken(good, "Deployment")["spec"].update(change)
    found = problems(good)
    assert len(found) == (reason is not None)
    assert all(f"its access modes are ReadWriteOnce, for one node; {reason}" in text for text in found)


def test_without_an_autoscaler_a_budget_counts_the_replicas(good):
    good.remove(taken(good, "HorizontalPodAutoscaler"))
    (sentence,) = problems(good)
    assert sentence.startswith("PodDisruptionBudget snugfit: spec.minAvailable is 1; none of 1 pods")
    taken(good, "Deployment")["spec"]["replicas"] = 2
    assert problems(good) == []


@pytest.mark.parametrize(("policy", "count"), [("OnFailure", 0), ("Never", 0), ("Always", 1), (None, 1)])
def test_a_job_without_rules_about_failures_may_restart_in_place(good, policy, count):
    spec = taken(good, "Job")["spec"]
    del spec["podFailurePolicy"]
    spec["template"]["spec"]["restartPolicy"] = policy
    found = problems(good)
    assert len(found) == count
    assert all(sentence.endswith("for a Job it is Never or OnFailure") for sentence in found)


def test_of_no_pods_none_has_to_be_evicted(good):
    good.remove(taken(good, "HorizontalPodAutoscaler"))
    taken(good, "Deployment")["spec"]["replicas"] = 0
    assert problems(good) == []


@pytest.mark.parametrize(
    ("image", "is_one"),
    [
        ("snugfit", True),
        ("snugfit:0.1.0-cuda", True),
        ("registry.example:5000/a/b-c_d:1", True),
        ("r.example/a@sha256:" + 64 * "0", True),
        ("Snugfit", False),
        ("a/b:", False),
        ("a b", False),
        ("a/:1", False),
    ],
)
def test_images_are_names_with_tag_or_digest(good, image, is_one):
    taken(good, "Job")["spec"]["template"]["spec"]["containers"][0]["image"] = image
    assert len(problems(good)) == (not is_one)


def test_a_value_of_the_wrong_type_hides_no_other_fault(good):
    taken(good, "Deployment")["spec"]["template"]["spec"]["containers"][0]["name"] = ["a", "list"]
    taken(good, "Service")["spec"]["type"] = "Nope"
    found = problems(good)
    assert any("stopped at a value of the wrong type" in sentence for sentence in found)
    assert any(sentence.startswith('Service snugfit: spec.type is "Nope"') for sentence in found)


def test_a_sidecar_may_have_ports_and_probes(good):
    pod = taken(good, "Deployment")["spec"]["template"]["spec"]
    sidecar = {
        "name": "proxy",
        "image": "proxy:1",
        "restartPolicy": "Always",
        "ports": [{"containerPort": 9090}],
    }
    pod["initContainers"].append({**sidecar, "readinessProbe": {"tcpSocket": {"port": 9090}}})
    assert problems(good) == []


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("16Gi", 16 * 2**30),
        ("500m", Decimal("0.5")),
        ("1e3", 1000),
        (2, 2),
        ("1.5k", 1500),
        (".5", Decimal("0.5")),
    ],
)
def test_quantities_are_numbers_with_units(text, number):
    assert parse(text) == number


@pytest.mark.parametrize("text", ["", "1Gib", "1 Gi", "1g", "Gi", "1KI", "0x10", True, None, "1_000", "1e"])
def test_what_is_no_quantity(text):
    assert parse(text) is None


@pytest.mark.parametrize(
    ("operator", "values", "is_taken"),
    [
        ("In", ["a", "b"], True),
        ("In", ["b"], False),
        ("NotIn", ["b"], True),
        ("Exists", None, True),
        ("DoesNotExist", None, False),
        ("Unlike", ["a"], False),
    ],
)
def test_selectors_may_have_expressions(operator, values, is_taken):
    rule = {"key": "tier", "operator": operator, "values": values}
    assert matches({"matchExpressions": [rule]}, {"tier": "a"}) is is_taken
