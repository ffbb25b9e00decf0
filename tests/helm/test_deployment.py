"""The service's pods: what they ask for, how they start, end and are replaced."""

import math

import pytest
import yaml

from deployment.rendering import CHART
from service.cli import main
from service.server import LAST_FRAMES_SECONDS

STOPPING_SECONDS = 10  # that Service.close waits for a load to end


@pytest.fixture(params=[["--device", "cpu"], ["--gpu", "16GiB"]], ids=["cpu", "gpu"])
def plan_file(request, capsys, tmp_path):
    """What `snugfit plan --helm-values` prints, in a file."""
    assert main(["plan", *request.param, "--helm-values"]) == 0
    file = tmp_path / "plan.yaml"
    file.write_text(capsys.readouterr().out)
    return file


def test_a_plans_values_are_taken_as_they_are_printed(chart, plan_file):
    planned, container = yaml.safe_load(plan_file.read_text()), chart(files=[plan_file]).container
    cpu = {"cpu": "500m"}
    assert container["resources"]["limits"] == planned["resources"]["limits"]
    assert container["resources"]["requests"] == {**planned["resources"]["requests"], **cpu}
    assert container["startupProbe"] | planned["startupProbe"] == container["startupProbe"]
    assert container != chart().container


def test_a_gpu_that_is_counted_is_asked_for_and_limited_alike(chart):
    gpu = {"count": 2, "resource": "amd.com/gpu", "runtimeClassName": "amd"}
    release = chart({"gpu": gpu, "resources": {"limits": {"memory": "2Gi"}}})
    assert release.container["resources"] == {
        "requests": {"cpu": "500m", "memory": "1Gi", "amd.com/gpu": 2},
        "limits": {"memory": "2Gi", "amd.com/gpu": 2},
    }
    assert release.pod["runtimeClassName"] == "amd"


def test_without_a_gpu_nothing_speaks_of_one(chart):
    release = chart()
    assert set(release.container["resources"]["limits"]) == {"memory"}
    assert "runtimeClassName" not in release.pod


@pytest.mark.parametrize(
    "resource", ["nvidia.com/gpu", "nvidia.com/gpu.shared", "nvidia.com/mig-1g.10gb", "amd.com/gpu"]
)
def test_a_gpu_may_be_asked_for_by_every_name_that_it_has(chart, resource):
    release = chart(
        {"resources": {"limits": {"memory": "4Gi", resource: 1}}, "gpu": {"runtimeClassName": "nvidia"}}
    )
    assert release.container["resources"]["limits"][resource] == 1


@pytest.mark.parametrize("limits", ["0=15GiB,cpu=0", "cpu=0, 0=15GiB", {0: "15GiB", "cpu": 0}])
def test_limits_of_a_gpu_go_with_one_in_every_form(chart, limits):
    memory = {"limits": {"memory": "4Gi"}}
    assert chart({"gpu": {"count": 1}, "resources": memory, "config": {"max_memory": limits}}).deployment


def test_without_pods_nobody_asks_what_they_compute_on(chart):
    assert chart({"replicaCount": 0, "gpu": {"count": 1, "runtimeClassName": "nvidia"}}).deployment


def test_why_a_container_ended_is_told_with_the_pod(chart, export_values):
    pod = chart(export_values).pod
    containers = [*pod["initContainers"], *pod["containers"]]
    assert {container["terminationMessagePolicy"] for container in containers} == {"FallbackToLogsOnError"}


def test_a_pod_counts_as_started_only_when_the_model_is_loaded(chart):
    container = chart().container
    assert container["startupProbe"]["httpGet"]["path"] == "/ready"
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_a_busy_or_draining_service_is_not_started_again(chart):
    """/health is 200 while it loads, drains or computes; it may be slow when every core computes."""
    probe = chart().container["livenessProbe"]
    assert probe["httpGet"]["path"] == "/health"
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 60


def test_probes_and_the_service_reach_the_port_of_the_configuration(chart):
    release = chart({"config": {"port": 9000}})
    assert release.container["ports"] == [{"name": "http", "containerPort": 9000}]
    probes = [value for name, value in release.container.items() if name.endswith("Probe")]
    assert [probe["httpGet"]["port"] for probe in probes] == ["http"] * 3
    assert release.one("Service")["spec"]["ports"][0]["targetPort"] == "http"


@pytest.mark.parametrize(("delay", "drain"), [(10, 30), (0, 0), (5, 120.5)])
def test_the_grace_period_has_room_for_the_delay_the_drain_and_the_end(chart, delay, drain):
    pod = chart({"drain": {"delaySeconds": delay}, "config": {"drain_seconds": drain}}).pod
    least = delay + math.ceil(drain) + STOPPING_SECONDS + LAST_FRAMES_SECONDS
    assert pod["terminationGracePeriodSeconds"] > least


def test_sigterm_comes_after_proxies_have_taken_note(chart):
    def hook(minor):
        release = chart({"drain": {"delaySeconds": 7}}, kubernetes=minor)
        return release.container["lifecycle"]["preStop"]

    assert hook("1.34") == hook("1.37") == {"sleep": {"seconds": 7}}
    assert hook("1.33") == {"exec": {"command": ["sleep", "7"]}}


def test_without_a_delay_there_is_no_hook(chart):
    assert "lifecycle" not in chart({"drain": {"delaySeconds": 0}}).container


def test_without_a_spare_gpu_an_old_pod_ends_before_a_new_one_starts(chart):
    strategy = chart({"replicaCount": 2}).deployment["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_with_a_spare_gpu_a_new_pod_is_ready_before_an_old_one_ends(chart):
    strategy = chart({"rollout": {"spare": True}}).deployment["strategy"]
    assert strategy["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_a_deployment_is_not_called_stuck_while_its_model_may_still_load(chart):
    release = chart({"startupProbe": {"periodSeconds": 10, "failureThreshold": 360}})
    loading = 10 * 360 + release.pod["terminationGracePeriodSeconds"]
    assert release.deployment["progressDeadlineSeconds"] > loading


@pytest.mark.parametrize(("deadline", "seconds"), [(None, 86_400), (200_000, 200_000)])
def test_nor_while_it_waits_for_an_export(chart, export_values, deadline, seconds):
    exporter = {**export_values["exporter"], "activeDeadlineSeconds": deadline}
    waiting = chart({**export_values, "exporter": exporter}).deployment["progressDeadlineSeconds"]
    assert waiting == chart().deployment["progressDeadlineSeconds"] + seconds


def test_kserves_pods_are_probed_as_the_charts(chart):
    (container,) = kserve("runtime.yaml")["spec"]["containers"]
    assert {name: probe for name, probe in container.items() if name.endswith("Probe")} == {
        name: probe for name, probe in chart().container.items() if name.endswith("Probe")
    }


@pytest.mark.parametrize("name", ["from-image.yaml", "from-volume.yaml"])
def test_kserves_pods_are_not_scaled_by_their_processors(name):
    assert kserve(name)["metadata"]["annotations"]["serving.kserve.io/autoscalerClass"] == "none"


def kserve(name):
    return yaml.safe_load((CHART.parent / "examples" / "kserve" / name).read_text())


def test_every_pod_is_as_restricted_as_can_be(chart, export_values):
    release = chart(export_values)
    pods = [release.pod, release.job["template"]["spec"], release.one("Pod")["spec"]]
    for pod in pods:
        assert pod["enableServiceLinks"] is pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == 10001
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }


def test_a_spread_without_a_selector_is_of_this_releases_pods(chart):
    spread = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "DoNotSchedule"}
    own = {"matchLabels": {"team": "a"}}
    release = chart({"topologySpreadConstraints": [spread, {**spread, "labelSelector": own}]})
    first, second = release.pod["topologySpreadConstraints"]
    assert first["labelSelector"] == release.deployment["selector"]
    assert second["labelSelector"] == own


def test_annotations_and_labels_of_ones_own_do_not_replace_the_charts(chart):
    keys = {"apiKeys": {"values": ["one"]}}
    plain = chart(keys).deployment["template"]["metadata"]
    own = {
        "podAnnotations": {"checksum/config": "mine", "checksum/api-keys": "mine", "a": "b"},
        "podLabels": {"app.kubernetes.io/name": "mine", "team": "ml"},
    }
    assert chart({**keys, **own}).deployment["template"]["metadata"] == {
        "annotations": {**plain["annotations"], "a": "b"},
        "labels": {**plain["labels"], "team": "ml"},
    }


def test_without_a_liveness_probe_no_container_is_started_again(chart):
    assert "livenessProbe" not in chart({"livenessProbe": None}).container


def test_without_resources_a_pod_asks_for_nothing_but_its_gpus(chart):
    assert chart({"resources": None}).container["resources"] == {}
    gpus = chart({"resources": None, "gpu": {"count": 1}}).container["resources"]
    assert gpus == {"requests": {"nvidia.com/gpu": 1}, "limits": {"nvidia.com/gpu": 1}}


def test_a_new_version_of_the_chart_alone_does_not_load_every_model_again(chart):
    labels = chart().deployment["template"]["metadata"]["labels"]
    assert not {"helm.sh/chart", "app.kubernetes.io/version"} & labels.keys()


def test_a_digest_wins_over_a_tag_and_that_over_the_charts_version(chart):
    digest = f"sha256:{'0' * 64}"
    named = {"repository": "registry.example.org/snugfit", "tag": "1.2"}
    assert chart({"image": {**named, "digest": digest}}).container["image"].endswith(f"/snugfit@{digest}")
    assert chart({"image": named}).container["image"].endswith("/snugfit:1.2")
    assert chart({"image": {"repository": "own"}}).container["image"] == "own:0.1.0"


def test_a_registry_may_have_a_port(chart):
    image = {"repository": "registry.example.org:5000/snugfit"}
    assert chart({"image": image}).container["image"] == "registry.example.org:5000/snugfit:0.1.0"


def test_an_own_service_account_may_be_used_and_none_made(chart):
    release = chart({"serviceAccount": {"create": False}})
    assert not release.all("ServiceAccount")
    assert release.pod["serviceAccountName"] == "default"
    named = chart({"serviceAccount": {"create": False, "name": "mine"}})
    assert named.pod["serviceAccountName"] == "mine"
