"""The example for KServe, and each fault seeded into it."""

from pathlib import Path

import pytest
import yaml

from deployment import kserve, manifests, policies, tools

EXAMPLES = Path(__file__).parents[2] / "examples" / "kserve"
GONE = ...  # as `seeded` has it

# kind, field, value, what the sentence says
FAULTS = [
    ("ServingRuntime", "apiVersion", "serving.kserve.io/v1", "it is serving.kserve.io/v1alpha1"),
    ("ServingRuntime", "metadata/label", {}, "'label' was unexpected"),
    ("ServingRuntime", "spec/containers", GONE, "'containers' is a required property"),
    ("ServingRuntime", "spec/containers/0/readinesProbe", {}, "'readinesProbe' was unexpected"),
    (
        "ServingRuntime",
        "spec/containers/0/readinessProbe/httpGet/port",
        GONE,
        "'port' is a required property",
    ),
    ("ServingRuntime", "spec/containers/0/ports/0/containerPort", "8000", "'8000' is not of type 'integer'"),
    ("ServingRuntime", "spec/multiModel", "no", "'no' is not of type 'boolean'"),
    ("ServingRuntime", "spec/workerSpec", {}, "the SDK lacks its type, so that it cannot be checked"),
    ("InferenceService", "spec/predictor/model/storageURI", "pvc://x", "'storageURI' was unexpected"),
    ("InferenceService", "spec/predictor/model/modelFormat", GONE, "'modelFormat' is a required property"),
    ("InferenceService", "spec/predictor/model/resources/limits/memory", ["4Gi"], "is not of type"),
    ("InferenceService", "spec/predictor/minReplicas", "1", "'1' is not of type 'integer'"),
    ("InferenceService", "metadata/annotations/owner", 1, "1 is not of type 'string'"),
]


@pytest.fixture(scope="module")
def examples():
    """from-image, from-volume, runtime."""
    if not tools.kserve_sdk():
        pytest.skip("KServe's SDK cannot be fetched: pip reaches no package index")
    return [yaml.safe_load(path.read_text()) for path in sorted(EXAMPLES.glob("*.yaml"))]


def test_the_examples_have_no_problem(examples):
    assert [example["kind"] for example in examples] == [*2 * ["InferenceService"], "ServingRuntime"]
    assert kserve.problems(examples) == []


@pytest.mark.parametrize(("kind", "field", "value", "says"), FAULTS)
def test_a_seeded_fault_is_told(examples, seeded, kind, field, value, says):
    faulty = seeded(examples, kind, field, value)
    (sentence,) = kserve.problems([faulty])
    assert sentence.startswith(f"{kind} {faulty['metadata']['name']}: ")
    assert says in sentence


def test_without_the_sdk_a_resource_is_not_passed(monkeypatch):
    monkeypatch.setattr(tools, "kserve_sdk", lambda: [])
    runtime = {"kind": "ServingRuntime", "metadata": {"name": "a"}}
    assert kserve.problems([runtime, {"kind": "Service"}]) == [
        "ServingRuntime a: it was not checked: KServe's SDK cannot be fetched"
    ]


@pytest.mark.parametrize("name", ["from-image.yaml", "from-volume.yaml"])
def test_the_pods_of_the_examples_are_restricted_and_their_parts_fit(name):
    documents = pod_of(yaml.safe_load((EXAMPLES / name).read_text()))
    assert policies.problems(documents) == []
    assert manifests.problems(documents) == []


def test_the_pods_of_the_examples_are_really_looked_at():
    documents = pod_of(yaml.safe_load((EXAMPLES / "from-image.yaml").read_text()))
    pod = documents[0]["spec"]
    pod["terminationGracePeriodSeconds"] = 30
    pod["enableServiceLinks"] = True
    del pod["containers"][0]["securityContext"]["seccompProfile"]
    assert len(policies.problems(documents)) == 1
    assert len(manifests.problems(documents)) == 2


def pod_of(service):
    """The pod that KServe makes of an InferenceService and our runtime, and a Service that tempts it."""
    runtime = yaml.safe_load((EXAMPLES / "runtime.yaml").read_text())
    predictor = service["spec"]["predictor"]
    assert predictor["model"]["runtime"] == runtime["metadata"]["name"]
    pod = {key: runtime["spec"][key] for key in ("containers", "volumes")}
    pod |= {key: predictor[key] for key in ("enableServiceLinks", "terminationGracePeriodSeconds")}
    (container,) = pod["containers"]
    container["resources"] = predictor["model"]["resources"]
    container["env"] = [{"name": "SNUGFIT_HOST", "value": "0.0.0.0"}]  # as the image has it
    tempting = {"kind": "Service", "metadata": {"name": "snugfit-predictor"}, "spec": {}}
    return [{"kind": "Pod", "metadata": {"name": service["metadata"]["name"]}, "spec": pod}, tempting]
