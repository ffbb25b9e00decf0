"""`config`: one value, every key of it, in the pod as the service reads it."""

import tomllib

import pytest

from deployment.rendering import documents, render
from service.settings import Settings
from service.sources import load_settings

EVERY_KIND = {
    "budget": "16GB",
    "cors_origins": ["https://chat.example.org"],
    "max_body_bytes": 2_000_000,
    "max_wait_seconds": 0.5,
    "context": 2_097_152,
    "log_format": "json",
    "model": 'a "name"\nof two lines',
}
ON_A_GPU = {"gpu": {"count": 1}, "resources": {"limits": {"memory": "8Gi"}}}


@pytest.fixture
def accepted(tmp_path, monkeypatch):
    """What the service makes of a TOML text, with the pod's own environment."""

    def read(text, environment=()):
        for variable in environment:
            monkeypatch.setenv(variable["name"], variable["value"])
        monkeypatch.delenv("SNUGFIT_CONFIG", raising=False)
        keys = tmp_path / "api-keys"
        keys.write_text("one\ntwo")
        file = tmp_path / "snugfit.toml"
        file.write_text(text.replace("/etc/snugfit/keys/api-keys", str(keys)))
        return load_settings({}, file)

    return read


def test_the_service_accepts_what_the_chart_writes_by_itself(chart, accepted):
    release = chart()
    settings = accepted(release.config, release.container["env"])
    assert (settings.host, settings.port, settings.drain_seconds) == ("0.0.0.0", 8000, 30)


def test_every_key_arrives_as_it_was_given(chart, accepted):
    settings = accepted(chart({"config": EVERY_KIND}).config)
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in EVERY_KIND.items()}
    assert settings.model_dump(include=set(given)) == given


def test_whole_numbers_stay_whole(chart):
    assert "context = 2097152\n" in chart({"config": EVERY_KIND}).config


def test_whole_numbers_stay_whole_in_a_map_too(chart, accepted, helm3):
    values = {**ON_A_GPU, "config": {"max_memory": {0: 16_000_000_000, "cpu": 8_000_000_000}}}
    release = chart(values)
    assert "cpu = 8000000000\n" in release.config + "\n"
    assert accepted(release.config).max_memory == "0=16000000000,cpu=8000000000"
    assert documents(render(helm3, values=values)) == release.documents


def test_limits_by_device_may_be_a_map(chart, accepted):
    text = chart({**ON_A_GPU, "config": {"max_memory": {0: "15GiB", "cpu": "30GiB"}}}).config
    assert accepted(text).max_memory == "0=15GiB,cpu=30GiB"


def test_on_and_off_may_stand_without_quotes_though_yaml_reads_them_as_truths(chart, tmp_path):
    typed = tmp_path / "values.yaml"
    typed.write_text("config: {prefix_reuse: off, vllm_metrics: on}")
    written = tomllib.loads(chart(files=[typed]).config)
    assert (written["prefix_reuse"], written["vllm_metrics"]) == ("off", "on")


def test_the_files_host_counts_and_not_the_images(chart, accepted, monkeypatch):
    release = chart({"config": {"host": "::"}})
    monkeypatch.setenv("SNUGFIT_HOST", "0.0.0.0")  # as the image sets it
    assert accepted(release.config, release.container["env"]).host == "::"


def test_the_pod_is_told_where_the_file_is_and_has_it_there(chart):
    release = chart()
    environment = {variable["name"]: variable["value"] for variable in release.container["env"]}
    (mount,) = (m for m in release.container["volumeMounts"] if m["name"] == "config")
    (volume,) = (v for v in release.pod["volumes"] if v["name"] == "config")
    assert environment["SNUGFIT_CONFIG"] == f"{mount['mountPath']}/snugfit.toml"
    assert "snugfit.toml" in release.one("ConfigMap", volume["configMap"]["name"])["data"]


def test_the_schema_knows_the_services_keys_and_no_others(schema):
    assert schema["properties"]["config"]["properties"].keys() == Settings.model_fields.keys()


def test_a_change_of_the_configuration_starts_the_pods_anew(chart):
    assert template(chart()) == template(chart())
    assert template(chart()) != template(chart({"config": {"max_queue": 65}}))


def test_a_change_of_the_keys_starts_the_pods_anew(chart):
    one, two = (chart({"apiKeys": {"values": [key]}}) for key in ("a", "b"))
    assert one.config == two.config
    assert template(one) != template(two)


def template(release):
    return release.deployment["template"]


def test_keys_become_a_secret_that_the_service_reads(chart, accepted):
    release = chart({"apiKeys": {"values": ["one", "two"]}})
    secret = release.one("Secret")
    (volume,) = (v for v in release.pod["volumes"] if v["name"] == "keys")
    (item,) = volume["secret"]["items"]
    (mount,) = (m for m in release.container["volumeMounts"] if m["name"] == "keys")
    assert volume["secret"]["secretName"] == secret["metadata"]["name"]
    assert secret["stringData"][item["key"]] == "one\ntwo"
    assert f"{mount['mountPath']}/{item['path']}" == tomllib.loads(release.config)["api_key_file"]
    assert accepted(release.config).api_keys == ("one", "two")


def test_keys_of_a_secret_that_exists_are_read_and_none_is_made(chart):
    release = chart({"apiKeys": {"existingSecret": "mine", "key": "all"}})
    (volume,) = (v for v in release.pod["volumes"] if v["name"] == "keys")
    assert volume["secret"] == {"secretName": "mine", "items": [{"key": "all", "path": "api-keys"}]}
    assert not release.all("Secret")


def test_without_keys_nothing_speaks_of_them(chart):
    release = chart()
    assert "api_key" not in release.config
    assert {volume["name"] for volume in release.pod["volumes"]} == {"tmp", "config"}
