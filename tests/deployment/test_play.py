"""What is changed in the rendered chart so that podman can run it, and that nothing else is."""

from __future__ import annotations

from copy import deepcopy

import pytest

from deployment import play
from deployment.outcome import Failed, Skipped
from deployment.play import playable

SECURITY = {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
CONFIG = {"name": "config", "mountPath": "/etc/snugfit", "readOnly": True}
KEYS = {"name": "keys", "mountPath": "/etc/snugfit/keys", "readOnly": True}
MODELS = {"name": "models", "mountPath": "/models", "readOnly": True}


@pytest.fixture
def deployment():
    container = {
        "name": "snugfit",
        "image": "snugfit:1",
        "args": ["serve"],
        "ports": [{"containerPort": 8000}],
        "readinessProbe": {"httpGet": {"path": "/ready", "port": 8000}},
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", "5"]}}},
        "securityContext": SECURITY,
        "volumeMounts": deepcopy([CONFIG, KEYS, MODELS]),
    }
    volumes = [{"name": "keys", "secret": {"secretName": "keys"}}, {"name": "tmp", "emptyDir": {}}]
    metadata = {"labels": {"app": "snugfit"}, "annotations": {"checksum/config": "f" * 64}}
    spec = {"template": {"metadata": metadata, "spec": {"containers": [container], "volumes": volumes}}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "test"}, "spec": spec}


def container_of(document):
    pod = document["spec"].get("template", document)["spec"]
    return pod["containers"][0]


def test_a_container_keeps_all_but_what_a_kubelet_does(deployment):
    before = set(container_of(deployment))
    (played,) = playable([deployment], ["Deployment"])
    assert before - set(container_of(played)) == {"ports", "readinessProbe", "lifecycle"}
    assert container_of(played)["securityContext"] == SECURITY
    assert played["spec"]["template"]["spec"]["hostNetwork"] is True


def test_only_a_mount_that_holds_another_is_opened(deployment):
    (played,) = playable([deployment], ["Deployment"])
    assert container_of(played)["volumeMounts"] == [{**CONFIG, "readOnly": False}, KEYS, MODELS]


def test_a_job_becomes_its_pod_without_the_hashes(deployment):
    job = {**deployment, "apiVersion": "batch/v1", "kind": "Job"}
    (pod,) = playable([job], ["Job"])
    assert (pod["kind"], pod["apiVersion"]) == ("Pod", "v1")
    assert pod["metadata"] == {"name": "test", "labels": {"app": "snugfit"}}
    assert container_of(pod)["args"] == ["serve"]


def test_a_secret_has_its_texts_encoded():
    secret = {"kind": "Secret", "metadata": {"name": "keys"}, "stringData": {"api-keys": "one-key"}}
    (encoded,) = playable([secret], ["Secret"])
    assert encoded == {"kind": "Secret", "metadata": {"name": "keys"}, "data": {"api-keys": "b25lLWtleQ=="}}


def test_documents_come_in_the_order_of_their_kinds():
    made = [{"kind": kind} for kind in ("Service", "ConfigMap", "PersistentVolumeClaim", "ConfigMap")]
    kinds = [document["kind"] for document in playable(made, ["PersistentVolumeClaim", "ConfigMap"])]
    assert kinds == ["PersistentVolumeClaim", "ConfigMap", "ConfigMap"]


def test_on_the_hosts_network_the_service_listens_on_the_loopback_address_alone():
    made = {"kind": "ConfigMap", "data": {"snugfit.toml": 'host = "0.0.0.0"\nport = 8000'}}
    (document,) = playable([made], ["ConfigMap"])
    assert document["data"]["snugfit.toml"] == 'host = "127.0.0.1"\nport = 8000'


def test_without_catatonit_the_step_is_skipped_and_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(play, "PODMANS_OWN", (str(tmp_path / "libexec"),))
    with pytest.raises(Skipped, match="apt-get install catatonit"):
        play.need_pause()
    (tmp_path / "libexec").mkdir()
    own = tmp_path / "libexec" / "catatonit"
    own.write_text("#!/bin/sh\n")
    own.chmod(0o755)
    play.need_pause()


def test_podmans_own_race_is_tried_again_and_nothing_else(monkeypatch):
    race = f"podman play kube: {play.PODMANS_RACE} 1234"
    said = [race, race, "something else"]

    def fails():
        raise Failed(said.pop(0))

    monkeypatch.setattr(play, "_play", fails)
    with pytest.raises(Failed, match="something else"):
        play.played()
    said.append("something else")
    with pytest.raises(Failed, match="something else"):
        play.played()
    assert not said
    said.extend([race] * play.TRIES)
    with pytest.raises(Failed, match=play.PODMANS_RACE):
        play.played()
    assert not said
