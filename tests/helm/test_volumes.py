"""Where the model lies: nowhere, on a claim that replicas can or cannot share, in an image."""

import pytest

ON_THE_VOLUME = {"config": {"model": "/models/m"}, "model": {"source": "pvc"}}


def with_volume(**persistence):
    return {**ON_THE_VOLUME, "persistence": persistence}


def models_mount(release):
    (mount,) = (m for m in release.container["volumeMounts"] if m["name"] == "models")
    return mount


def models_volume(release):
    (volume,) = (v for v in release.pod["volumes"] if v["name"] == "models")
    return volume


def test_a_claim_is_made_and_mounted_where_the_configuration_looks(chart):
    release = chart(with_volume(size="80Gi", storageClass="nfs"))
    claim = release.one("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["storageClassName"] == "nfs"
    assert claim["spec"]["resources"]["requests"]["storage"] == "80Gi"
    assert models_volume(release)["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert models_mount(release)["mountPath"] == "/models"


def test_the_service_cannot_write_to_its_models(chart):
    assert models_mount(chart(with_volume()))["readOnly"] is True


def test_what_comes_from_the_hub_can_be_kept_on_the_volume(chart):
    release = chart({**with_volume(readOnly=False), "config": {"model": "owner/name"}})
    environment = {variable["name"]: variable["value"] for variable in release.container["env"]}
    assert environment["HF_HOME"].startswith(models_mount(release)["mountPath"] + "/")
    assert models_mount(release)["readOnly"] is False


def test_a_claim_that_exists_is_used_and_none_made(chart):
    release = chart(with_volume(existingClaim="shared"))
    assert models_volume(release)["persistentVolumeClaim"] == {"claimName": "shared"}
    assert not release.all("PersistentVolumeClaim")


def test_models_outlive_the_release_unless_told_otherwise(chart):
    def policy(**persistence):
        metadata = chart(with_volume(**persistence)).one("PersistentVolumeClaim")["metadata"]
        return metadata.get("annotations", {}).get("helm.sh/resource-policy")

    assert policy() == "keep"
    assert policy(keep=False) is None


def test_a_volume_of_many_readers_is_claimed_read_only_and_shared(chart):
    source = {"kind": "PersistentVolumeClaim", "name": "exported"}
    release = chart({**with_volume(accessMode="ReadOnlyMany", dataSource=source), "replicaCount": 4})
    assert models_volume(release)["persistentVolumeClaim"]["readOnly"] is True
    assert release.one("PersistentVolumeClaim")["spec"]["dataSource"] == source


def test_a_claim_may_be_filled_from_a_snapshot(chart):
    source = {"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "exported"}
    release = chart(with_volume(accessMode="ReadOnlyMany", dataSource=source))
    assert release.one("PersistentVolumeClaim")["spec"]["dataSource"] == source


@pytest.mark.parametrize("mode", ["ReadWriteOnce", "ReadWriteOncePod"])
def test_a_volume_that_one_node_has_is_let_go_before_the_next_pod_takes_it(chart, mode):
    assert chart(with_volume(accessMode=mode)).deployment["strategy"] == {"type": "Recreate"}


def test_a_model_in_an_image_is_mounted_where_the_configuration_looks(chart):
    image = {"reference": "registry.example.org/m:1", "pullPolicy": "Always"}
    values = {"config": {"model": "/models"}, "model": {"source": "image", "image": image}, "replicaCount": 3}
    release = chart(values)
    assert models_volume(release)["image"] == image
    assert models_mount(release) == {
        "name": "models", "mountPath": "/models", "readOnly": True, "subPath": "models",
    }  # fmt: skip
    assert not release.all("PersistentVolumeClaim")


def test_by_itself_the_chart_needs_no_volume(chart):
    release = chart()
    assert not release.all("PersistentVolumeClaim")
    assert [volume["name"] for volume in release.pod["volumes"]] == ["tmp", "config"]
