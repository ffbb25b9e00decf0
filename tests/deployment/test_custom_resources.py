"""Custom resources of other projects: without a fault, and with each fault seeded into them."""

import pytest

from deployment import tools
from deployment.custom_resources import MODULES, _output, problems
from deployment.outcome import Failed

TRIGGER = {"type": "prometheus", "metadata": {"serverAddress": "http://p", "query": "q", "threshold": "4"}}
SCALED_OBJECT = {
    "apiVersion": "keda.sh/v1alpha1",
    "kind": "ScaledObject",
    "metadata": {"name": "snugfit"},
    "spec": {"scaleTargetRef": {"name": "snugfit"}, "maxReplicaCount": 4, "triggers": [TRIGGER]},
}
GONE = ...  # as `seeded` has it

# kind, field, value, what a sentence about it says
FAULTS = [
    ("ServiceMonitor", "spec/endpoints/0/intervall", "15s", '"intervall"'),
    ("ServiceMonitor", "spec/endpoints/0/interval", "15 seconds", "endpoints/0/interval must match pattern"),
    ("ServiceMonitor", "spec/endpoints/0/scheme", "ftp", "scheme must be equal to one of"),
    ("ServiceMonitor", "spec/endpoints/0/port", 80, "port must be string"),
    ("ServiceMonitor", "spec/selector/matchLabel", {}, '"matchLabel"'),
    ("ServiceMonitor", "spec/selector", GONE, "must have required property selector"),
    ("PrometheusRule", "spec/groups/0/rules/0/expression", "up", '"expression"'),
    ("PrometheusRule", "spec/groups/0/rules/0/expr", GONE, "must have required property expr"),
    ("PrometheusRule", "spec/groups/0/rules/0/for", "5 minutes", "for must match pattern"),
    ("PrometheusRule", "spec/groups/0/rules/0/labels/page", 1, "page must be string"),
    ("ScaledObject", "spec/coolDownPeriod", 30, '"coolDownPeriod"'),
    ("ScaledObject", "spec/maxReplicaCount", "4", "maxReplicaCount must be integer"),
    ("ScaledObject", "spec/triggers/0/metadata/threshold", 4, "threshold must be string"),
    ("ScaledObject", "spec/triggers", GONE, "must have required property triggers"),
    ("HTTPRoute", "spec/rules/0/timeouts/request", "never", "request must match pattern"),
    ("HTTPRoute", "spec/rules/0/matches/0/path/type", "Prefix", "type must be equal to one of"),
    ("HTTPRoute", "spec/rules/0/backendRefs/0/port", 99999, "port must be <= 65535"),
    ("HTTPRoute", "spec/rules/0/backendRefs/0/prot", 80, '"prot"'),
    ("HTTPRoute", "spec/hostnames", ["no host"], "hostnames/0 must match pattern"),
    ("HTTPRoute", "apiVersion", "gateway.networking.k8s.io/v2", "apiVersion must be equal to one of"),
]


@pytest.fixture
def resources(good):
    return [SCALED_OBJECT, *(document for document in good if document["kind"] in MODULES)]


def test_every_seeded_fault_is_told_and_what_is_right_has_no_problem(resources, seeded):
    """All in one call, since the compiler takes seconds to start."""
    models = tools.kubernetes_models()
    if models is None:
        pytest.skip("custom resources are NOT checked: their types take Node.js, npm and its registry")
    assert {document["kind"] for document in resources} == set(MODULES)
    faulty = [seeded(resources, *fault[:3]) for fault in FAULTS]
    for number, document in enumerate(faulty):
        document["metadata"]["name"] = f"fault-{number}"
    found = problems(models, [*resources, *faulty])
    for number, (kind, field, _, says) in enumerate(FAULTS):
        told = [sentence for sentence in found if sentence.startswith(f"{kind} fault-{number}: ")]
        assert any(says in sentence for sentence in told), (field, told)
    assert [sentence for sentence in found if " fault-" not in sentence.split(":")[0]] == []


@pytest.mark.parametrize("dies", ["kill -9 $$", "exit 1", "echo fault; exit 3", "echo fault >&2"])
def test_a_checker_that_did_not_do_its_work_has_passed_nothing(dies):
    with pytest.raises(Failed, match="sh ended with"):
        _output(["sh", "-c", dies], ends_with=(0, 1, 2))


def test_what_a_checker_printed_is_what_it_found():
    assert _output(["sh", "-c", "echo fault; exit 2"], ends_with=(0, 1, 2)) == "fault\n"
    with pytest.raises(Failed):
        _output(["sh", "-c", "echo fault; exit 2"])


def test_a_kind_without_a_schema_is_told_and_kubernetes_own_are_not(tmp_path, good):
    strange = {"apiVersion": "karpenter.sh/v1", "kind": "NodePool", "metadata": {"name": "gpus"}}
    own = [document for document in good if document["kind"] not in MODULES]
    assert problems(tmp_path, [*own, strange]) == [
        "NodePool gpus: it was not checked: there is no schema of karpenter.sh/v1"
    ]
