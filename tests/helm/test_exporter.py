"""The exporter's Job, and the service that waits for what it makes."""

import subprocess
import time

import pytest

import exporter.__main__
import service.cli
from exporter import manifest
from exporter.spec import from_toml, make_spec
from loader.checkpoint import CONFIG
from loader.errors import EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_INTERRUPTED, EXIT_RETRY, EXIT_USAGE

OTHER_EXPORT_THERE, VERIFICATION_FAILED, STOPPED = 44, 45, 143


def container(release):
    (found,) = release.job["template"]["spec"]["containers"]
    return found


def failing(release):
    (rule,) = (r for r in release.job["podFailurePolicy"]["rules"] if r["action"] == "FailJob")
    return rule["onExitCodes"]


def test_the_exporter_accepts_the_specification_that_the_chart_writes(chart, export_values, tmp_path):
    export_values["exporter"]["spec"] |= {"shard_size": 1_880_000_000, "check_logits": True}
    release = chart(export_values)
    written = tmp_path / "export.toml"
    written.write_text(release.one("ConfigMap", "-export")["data"]["export.toml"])
    spec = make_spec(from_toml(written))
    assert (spec.base, str(spec.out)) == ("Qwen/Qwen2.5-7B-Instruct", "/models/merged")
    assert [str(adapter) for adapter in spec.adapters] == ["owner/lora:0.5"]
    assert (spec.shard_bytes, spec.check_logits) == (1_880_000_000, True)


def test_the_job_reads_that_specification(chart, export_values):
    release = chart(export_values)
    *_, option, path = container(release)["args"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container(release)["volumeMounts"]}
    assert (option, path) == ("--config", f"{mounts['config']}/export.toml")
    assert mounts["models"] == "/models"


@pytest.mark.parametrize(
    "code", [EXIT_USAGE, EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, OTHER_EXPORT_THERE, VERIFICATION_FAILED]
)
def test_what_no_retry_mends_fails_the_job_at_once(chart, export_values, code):
    rule = failing(chart(export_values))
    assert rule["operator"] == "In"
    assert code in rule["values"]


@pytest.mark.parametrize("code", [EXIT_RETRY, STOPPED, EXIT_INTERRUPTED, 1, 137])
def test_what_a_retry_may_mend_is_tried_again_and_counted(chart, export_values, code):
    """A rule that ignored them would try for ever, without a pause."""
    release = chart(export_values)
    rules = release.job["podFailurePolicy"]["rules"]
    assert not [rule for rule in rules if code in rule.get("onExitCodes", {}).get("values", [])]
    assert release.job["backoffLimit"] == 6


def test_the_codes_are_those_of_the_container_that_exports(chart, export_values):
    release = chart(export_values)
    assert failing(release)["containerName"] == container(release)["name"]
    assert release.job["template"]["spec"]["restartPolicy"] == "Never"


def test_a_pod_that_was_evicted_does_not_count_as_a_try(chart, export_values):
    rules = chart(export_values).job["podFailurePolicy"]["rules"]
    (rule,) = (rule for rule in rules if rule["action"] == "Ignore")
    assert rule["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]


def test_both_images_understand_the_jobs_arguments(chart, export_values, capfd):
    """They stand behind `snugfit` in the service's image, behind `python -m exporter` in the exporter's."""
    command, *arguments = container(chart(export_values))["args"]
    assert "command" not in container(chart(export_values))
    assert command in service.cli.COMMANDS
    assert exporter.__main__.main([command, *arguments]) == EXIT_USAGE
    assert "/etc/snugfit/export.toml: cannot be read" in capfd.readouterr().err


def test_a_second_try_finds_what_the_first_has_downloaded(chart, export_values):
    """A base that is downloaded again has other modification times, and no shard of it could be kept."""
    environment = {v["name"]: v["value"] for v in container(chart(export_values))["env"]}
    assert environment["HF_HOME"].startswith("/models/")


def test_another_export_is_another_job_and_the_same_one_is_not(chart, export_values):
    def name(**values):
        return chart({**export_values, **values}).one("Job")["metadata"]["name"]

    assert name() == name(replicaCount=3, podLabels={"team": "a"})
    other = {**export_values["exporter"], "spec": {**export_values["exporter"]["spec"], "adapters": []}}
    assert len({name(), name(exporter=other), name(image={"tag": "2"}), name(nodeSelector={"a": "b"})}) == 4


def test_the_jobs_pod_has_annotations_labels_and_a_priority_of_its_own(chart, export_values):
    own = {
        "podAnnotations": {"example.org/inject": "false", "checksum/config": "mine"},
        "podLabels": {"team": "ml", "app.kubernetes.io/component": "service"},
        "priorityClassName": "batch",
    }
    values = {**export_values, "priorityClassName": "serving", "podLabels": {"not": "here"}}
    plain = chart(values).job["template"]
    template = chart({**values, "exporter": {**export_values["exporter"], **own}}).job["template"]
    assert template["metadata"] == {
        "annotations": {**plain["metadata"]["annotations"], "example.org/inject": "false"},
        "labels": {**plain["metadata"]["labels"], "team": "ml"},
    }
    assert template["spec"]["priorityClassName"] == "batch"
    assert "priorityClassName" not in plain["spec"]


def test_names_with_a_hash_fit_into_a_label(chart, export_values):
    release = chart({**export_values, "fullnameOverride": "x" * 63})
    assert all(len(document["metadata"]["name"]) <= 63 for document in release.documents)


def test_on_a_volume_that_one_node_has_the_exporter_goes_where_the_service_waits(chart, export_values):
    export_values["persistence"] = {"accessMode": "ReadWriteOnce"}
    release = chart(export_values)
    affinity = release.job["template"]["spec"]["affinity"]["podAffinity"]
    (term,) = affinity["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    labels = release.deployment["template"]["metadata"]["labels"]
    assert labels.items() >= term["labelSelector"]["matchLabels"].items()


def test_on_a_shared_volume_or_with_no_service_it_goes_anywhere(chart, export_values):
    assert "affinity" not in chart(export_values).job["template"]["spec"]
    alone = {**export_values, "persistence": {"accessMode": "ReadWriteOnce"}, "replicaCount": 0}
    assert "affinity" not in chart(alone).job["template"]["spec"]


def test_the_exporter_tolerates_what_the_service_does_unless_told_otherwise(chart, export_values):
    taint = {"key": "nvidia.com/gpu", "operator": "Exists"}
    values = {**export_values, "tolerations": [taint], "nodeSelector": {"pool": "gpu"}}
    pod = chart(values).job["template"]["spec"]
    assert (pod["tolerations"], pod["nodeSelector"]) == ([taint], {"pool": "gpu"})
    values["exporter"] = {**values["exporter"], "tolerations": [{"key": "own"}], "nodeSelector": {"a": "b"}}
    pod = chart(values).job["template"]["spec"]
    assert (pod["tolerations"], pod["nodeSelector"]) == ([{"key": "own"}], {"a": "b"})


def test_the_exporters_image_may_be_another_one(chart, export_values):
    own = {"repository": "registry.example.org/exporter", "tag": "7", "pullPolicy": "Always"}
    assert container(chart(export_values))["image"] == "snugfit:0.1.0"
    there = container(chart({**export_values, "exporterImage": own}))
    assert (there["image"], there["imagePullPolicy"]) == ("registry.example.org/exporter:7", "Always")


# The init step, really run


@pytest.fixture
def waiting(chart, export_values, tmp_path):
    """The init container's command as a process of this machine, with a folder in the place of /models."""
    (step,) = chart(export_values).pod["initContainers"]
    words = [word.replace("/models", str(tmp_path)) for word in [*step["command"], *step["args"]]]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_the_service_waits_until_the_export_is_published(waiting, tmp_path):
    assert str(tmp_path / "merged") in waiting.stdout.readline()
    staging = tmp_path / ".merged.snugfit-export"
    staging.mkdir()
    for name in (CONFIG, manifest.NAME):
        (staging / name).write_text("{}")
    time.sleep(2.5)  # longer than it sleeps between two looks
    assert waiting.poll() is None, "it did not wait for the rename"
    staging.rename(tmp_path / "merged")
    assert waiting.wait(timeout=10) == 0


def test_a_model_that_was_copied_there_is_waited_for_like_an_export(waiting, tmp_path):
    waiting.stdout.readline()
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / CONFIG).write_text("{}")
    assert waiting.wait(timeout=10) == 0


def test_a_service_that_waits_ends_when_it_is_told_to(waiting):
    waiting.stdout.readline()
    waiting.terminate()
    assert waiting.wait(timeout=10) == STOPPED


def test_the_step_needs_nothing_but_the_services_image_and_only_reads(chart, export_values):
    release = chart(export_values)
    (step,) = release.pod["initContainers"]
    assert step["image"] == release.container["image"]
    (mount,) = (m for m in step["volumeMounts"] if m["name"] == "models")
    assert mount["readOnly"] is True


@pytest.mark.parametrize("persistence", [{}, {"accessMode": "ReadWriteOnce"}, {"readOnly": False}])
def test_the_pods_stay_when_the_exporter_is_switched_off(chart, export_values, persistence):
    """As docs/kubernetes.md tells to, once the Job is complete."""
    export_values |= {"persistence": persistence, "apiKeys": {"values": ["one"]}}
    on = chart(export_values)
    off = chart({**export_values, "exporter": {**export_values["exporter"], "enabled": False}})
    assert on.all("Job")
    assert not off.all("Job")
    assert off.deployment["template"] == on.deployment["template"]


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"config": {"model": "owner/name"}},
        {"config": {"model": "owner/name"}, "model": {"source": "pvc"}, "persistence": {"readOnly": False}},
        {"config": {"model": "/models"}, "model": {"source": "image", "image": {"reference": "r.example/m"}}},
    ],
    ids=["built-in", "hub", "hub, kept on the volume", "image"],
)
def test_nothing_waits_for_a_model_that_no_volume_has(chart, values):
    release = chart(values)
    assert "initContainers" not in release.pod
    assert not release.all("Job")
