"""compose.yaml: hardened, in the right order, and every file that it mounts is there."""

from __future__ import annotations

import tomllib
from typing import Any

import pytest
import yaml

from deployment import ROOT
from deployment.images import compose
from deployment.outcome import Skipped
from service.settings import Settings

SERVICES: dict[str, Any] = yaml.safe_load(compose.FILE.read_text(encoding="utf-8"))["services"]


def toml(name: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / "compose" / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("service", SERVICES.values(), ids=list(SERVICES))
def test_every_container_is_hardened(service):
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["tmpfs"] == ["/tmp"]


@pytest.mark.parametrize("service", SERVICES.values(), ids=list(SERVICES))
def test_what_is_mounted_from_the_repository_is_there_and_read_only(service):
    for volume in service["volumes"]:
        source, _, *mode = volume.split(":")
        if source.startswith("."):
            assert (ROOT / source).exists(), source
            assert mode == ["ro"], source


@pytest.mark.parametrize("service", SERVICES.values(), ids=list(SERVICES))
def test_ports_are_open_to_this_machine_only(service):
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


def test_the_service_starts_after_the_export_and_serves_what_it_made():
    condition = SERVICES["service"]["depends_on"]["exporter"]["condition"]
    assert condition == "service_completed_successfully"
    assert toml("snugfit.toml")["model"] == toml("export.toml")["out"]


def test_the_files_hold_keys_that_the_programs_know():
    Settings(**toml("snugfit.toml"))
    mounted = {volume.split(":")[1] for volume in SERVICES["exporter"]["volumes"]}
    assert {toml("export.toml")["base"], *toml("export.toml")["adapters"]} <= mounted


def test_a_container_is_given_longer_to_stop_than_requests_to_finish():
    seconds = int(SERVICES["service"]["stop_grace_period"].removesuffix("s"))
    assert seconds > Settings(**toml("snugfit.toml")).drain_seconds


def test_prometheus_scrapes_the_service_and_reads_the_charts_rules():
    configuration = yaml.safe_load((ROOT / "compose" / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = configuration["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target == f"service:{Settings().port}"
    assert "./helm/rules:/etc/prometheus/rules:ro" in SERVICES["prometheus"]["volumes"]
    assert configuration["rule_files"] == ["/etc/prometheus/rules/*.yaml"]
    assert list((ROOT / "helm" / "rules").glob("*.yaml"))


def test_grafana_finds_prometheus_and_the_charts_dashboard():
    (source,) = yaml.safe_load((ROOT / "compose/grafana/datasources.yml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((ROOT / "compose/grafana/dashboards.yml").read_text(encoding="utf-8"))[
        "providers"
    ]
    assert f"./helm/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / "helm" / "dashboards" / home.rpartition("/")[2]).is_file()


def test_docker_compose_accepts_it_and_refuses_copies_with_a_fault():
    try:
        assert "refused" in compose.config()
    except Skipped as err:
        pytest.skip(str(err))
