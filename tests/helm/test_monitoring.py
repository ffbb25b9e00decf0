"""What Prometheus and Grafana take from the chart."""

import json
import shutil

import pytest
import yaml

from deployment.rendering import CHART, Refused, render


def test_prometheus_scrapes_the_service_by_its_own_labels(chart):
    release = chart({"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}})
    monitor, service = release.one("ServiceMonitor"), release.one("Service")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert service["metadata"]["labels"].items() >= monitor["spec"]["selector"]["matchLabels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    assert endpoint["path"] == "/metrics"


def test_a_scrape_takes_as_long_as_prometheus_lets_it_unless_told_otherwise(chart):
    def endpoint(**monitor):
        (found,) = chart({"serviceMonitor": {"enabled": True, **monitor}}).one("ServiceMonitor")["spec"][
            "endpoints"
        ]
        return found

    assert endpoint(interval="5s") == {"port": "http", "path": "/metrics", "interval": "5s"}
    assert endpoint(interval="1m", scrapeTimeout="60s")["scrapeTimeout"] == "60s"


def test_the_rules_are_those_of_the_file(chart):
    rule = chart({"prometheusRule": {"enabled": True}}).one("PrometheusRule")
    assert rule["spec"] == yaml.safe_load((CHART / "rules" / "snugfit.yaml").read_text())


def test_the_dashboard_is_that_of_the_file_and_grafana_finds_it(chart):
    dashboard = chart({"dashboard": {"enabled": True}}).one("ConfigMap", "-dashboard")
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"
    (text,) = dashboard["data"].values()
    assert json.loads(text) == json.loads((CHART / "dashboards" / "snugfit.json").read_text())


@pytest.mark.parametrize(
    ("part", "file"), [("prometheusRule", "rules/snugfit.yaml"), ("dashboard", "dashboards/snugfit.json")]
)
def test_a_chart_without_the_file_says_so(helm, tmp_path, part, file):
    copy = shutil.copytree(CHART, tmp_path / "snugfit")
    (copy / file).unlink()
    with pytest.raises(Refused, match=f"{file} is missing"):
        render(helm, values={part: {"enabled": True}}, chart=copy)


def test_by_itself_the_chart_makes_nothing_that_needs_an_operator(chart):
    assert {document["kind"] for document in chart().documents} == {
        "ConfigMap", "Deployment", "Pod", "Service", "ServiceAccount",
    }  # fmt: skip
