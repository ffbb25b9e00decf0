"""Every rule of the level `restricted`: a pod that keeps it, and one that does not."""

from copy import deepcopy

import pytest

from deployment.manifests.objects import Objects
from deployment.policies import RULES, problems

KINDS = {
    "Pod": [],
    "Deployment": ["spec", "template"],
    "Job": ["spec", "template"],
    "CronJob": ["spec", "jobTemplate", "spec", "template"],
}
LISTS = ("containers", "initContainers", "ephemeralContainers")


def pod():
    """A pod that keeps every rule, with a container of each sort."""
    context = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    secure = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    containers = {key: [{"name": key.lower(), "securityContext": deepcopy(context)}] for key in LISTS}
    return {"metadata": {}, "spec": {"securityContext": secure, **containers}}


def document(pod, kind="Pod"):
    for step in reversed(KINDS[kind]):
        pod = {step: pod}
    return {"kind": kind, **pod, "metadata": {**pod.get("metadata", {}), "name": "x"}}


def put(pod, field, value):
    *steps, last = field.split("/")
    node = pod["spec"]
    for step in steps:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    if value is None:
        node.pop(last, None)
    else:
        node[last] = value


# rule, field, values that are refused, values that are allowed (None: the field is not there)
OF_PODS = [
    ("host_namespaces", "hostNetwork", [True], [False, None]),
    ("host_namespaces", "hostPID", [True], [False, None]),
    ("host_namespaces", "hostIPC", [True], [False, None]),
    (
        "sysctls",
        "securityContext/sysctls",
        [[{"name": "kernel.msgmax"}]],
        [[{"name": "net.ipv4.tcp_syncookies"}]],
    ),
    (
        "volume_types",
        "volumes",
        [[{"name": "a", "hostPath": {"path": "/"}}], [{"name": "a", "nfs": {}}], [{"name": "a"}]],
        [
            [{"name": "a", kind: {}}]
            for kind in ("emptyDir", "image", "csi", "secret", "projected", "ephemeral")
        ],
    ),
]
OF_CONTEXTS = [
    ("windows_host_process", "windowsOptions", [{"hostProcess": True}], [{"hostProcess": False}, {}, None]),
    ("apparmor", "appArmorProfile", [{"type": "Unconfined"}], [{"type": "RuntimeDefault"}, None]),
    (
        "selinux",
        "seLinuxOptions",
        [{"type": "spc_t"}, {"user": "root"}, {"role": "r"}],
        [{"type": "container_t"}],
    ),
    ("run_as_non_root", "runAsNonRoot", [False], [True]),
    ("run_as_user", "runAsUser", [0], [1, 10001, None]),
    (
        "seccomp",
        "seccompProfile",
        [{"type": "Unconfined"}],
        [{"type": "Localhost"}, {"type": "RuntimeDefault"}],
    ),
]
OF_CONTAINERS = [
    ("privileged", "securityContext/privileged", [True], [False, None]),
    ("proc_mount", "securityContext/procMount", ["Unmasked"], ["Default", None]),
    (
        "host_ports",
        "ports",
        [[{"containerPort": 80, "hostPort": 80}]],
        [[{"containerPort": 80, "hostPort": 0}]],
    ),
    ("privilege_escalation", "securityContext/allowPrivilegeEscalation", [True, None], [False]),
    (
        "capabilities",
        "securityContext/capabilities/drop",
        [None, [], ["NET_RAW"]],
        [["ALL"], ["ALL", "KILL"]],
    ),
    ("capabilities", "securityContext/capabilities/add", [["SYS_ADMIN"]], [["NET_BIND_SERVICE"], [], None]),
    *(
        ("host_of_probes_and_hooks", f"{place}/{handler}/host", ["1.2.3.4"], ["", None])
        for place in (
            "startupProbe",
            "readinessProbe",
            "livenessProbe",
            "lifecycle/preStop",
            "lifecycle/postStart",
        )
        for handler in ("httpGet", "tcpSocket")
    ),
]
CASES = [
    *OF_PODS,
    *((rule, f"securityContext/{field}", *values) for rule, field, *values in OF_CONTEXTS),
    *(
        (rule, f"{key}/0/securityContext/{field}", *values)
        for rule, field, *values in OF_CONTEXTS
        for key in LISTS
    ),
    *((rule, f"{key}/0/{field}", *values) for rule, field, *values in OF_CONTAINERS for key in LISTS),
]


def test_every_rule_has_its_cases():
    assert {rule for rule, *_ in CASES} == {rule.__name__ for rule in RULES}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pod_that_keeps_every_rule_has_no_problem(kind):
    assert problems([document(pod(), kind)]) == []


@pytest.mark.parametrize(("rule", "field", "refused", "allowed"), CASES)
def test_a_rule_refuses_and_allows_what_the_standard_says(rule, field, refused, allowed):
    for value in refused:
        faulty = pod()
        put(faulty, field, value)
        (sentence,) = problems([document(faulty)])
        path = field.replace("/0/", "[0].").replace("/", ".")
        assert sentence.startswith(f"Pod x: spec.{path}")
        assert [r.__name__ for r in RULES if list(r(Objects([document(faulty)]).pods[0]))] == [rule]
    for value in allowed:
        kept = pod()
        put(kept, field, value)
        assert problems([document(kept)]) == [], value


@pytest.mark.parametrize("field", ["runAsNonRoot", "seccompProfile"])
def test_what_the_pod_does_not_say_every_container_has_to(field):
    silent = pod()
    value = silent["spec"]["securityContext"].pop(field)
    assert [sentence.split(" is ")[0].split(".")[1] for sentence in problems([document(silent)])] == [
        "initContainers[0]",
        "containers[0]",
        "ephemeralContainers[0]",
    ]
    for key in LISTS:
        silent["spec"][key][0]["securityContext"][field] = value
    assert problems([document(silent)]) == []


@pytest.mark.parametrize(
    ("profile", "count"), [("runtime/default", 0), ("localhost/x", 0), ("unconfined", 1)]
)
def test_apparmor_may_be_said_in_the_old_annotation(profile, count):
    old = pod()
    old["metadata"]["annotations"] = {"container.apparmor.security.beta.kubernetes.io/containers": profile}
    assert len(problems([document(old)])) == count


@pytest.mark.parametrize("kind", KINDS)
def test_the_pods_of_every_kind_are_looked_at(kind):
    faulty = pod()
    faulty["spec"]["hostNetwork"] = True
    path = ".".join([*KINDS[kind], "spec", "hostNetwork"])
    expected = f"{kind} x: {path} is true; restricted allows no value or false"
    assert problems([document(faulty, kind)]) == [expected]


def test_the_chart_keeps_every_rule(rendered):
    assert {name: problems(documents) for name, (documents, _) in rendered.items()} == {
        name: [] for name in rendered
    }
