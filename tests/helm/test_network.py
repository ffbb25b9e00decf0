"""Who reaches the service, how, and what the pods reach."""

import pytest

DNS = {"ports": [{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]}
HTTPS = {"ports": [{"port": 443, "protocol": "TCP"}]}


def policy(release, name="test-snugfit"):
    return release.one("NetworkPolicy", name)["spec"]


def test_the_service_is_reached_on_its_port_and_reaches_nothing_but_dns(chart):
    release = chart({"networkPolicy": {"enabled": True}})
    assert policy(release)["policyTypes"] == ["Ingress", "Egress"]
    assert policy(release)["ingress"] == [{"ports": [{"port": "http", "protocol": "TCP"}]}]
    assert policy(release)["egress"] == [DNS]
    assert policy(release)["podSelector"] == release.deployment["selector"]


@pytest.mark.parametrize(("model", "egress"), [("owner/name", [DNS, HTTPS]), ("/opt/model", [DNS])])
def test_only_a_model_of_the_hub_opens_the_way_to_it(chart, model, egress):
    values = {"config": {"model": model}, "networkPolicy": {"enabled": True}}
    assert policy(chart(values))["egress"] == egress


def test_the_exporter_reaches_the_hub_and_nobody_reaches_it(chart, export_values):
    release = chart({**export_values, "networkPolicy": {"enabled": True}})
    assert policy(release)["egress"] == [DNS]
    assert policy(release, "-export")["egress"] == [DNS, HTTPS]
    assert policy(release, "-export")["policyTypes"] == ["Ingress", "Egress"]
    assert "ingress" not in policy(release, "-export")
    labels = release.job["template"]["metadata"]["labels"]
    assert labels == policy(release, "-export")["podSelector"]["matchLabels"]


def test_an_exporter_that_reads_the_volume_alone_needs_no_hub(chart, export_values):
    export_values["exporter"]["spec"] |= {"base": "/models/base", "adapters": ["/models/lora:0.5"]}
    release = chart({**export_values, "networkPolicy": {"enabled": True}})
    assert policy(release, "-export")["egress"] == [DNS]


def test_callers_can_be_named_and_ways_out_be_added(chart):
    peer, rule = {"podSelector": {"matchLabels": {"app": "chat"}}}, {"ports": [{"port": 4318}]}
    values = {"networkPolicy": {"enabled": True, "ingressFrom": [peer], "egress": [rule]}}
    release = chart(values)
    assert policy(release)["ingress"][0]["from"][0] == peer
    assert policy(release)["egress"] == [DNS, rule]


def test_callers_that_are_named_do_not_shut_out_helm_test(chart):
    peer = {"podSelector": {"matchLabels": {"app": "chat"}}}
    release = chart({"networkPolicy": {"enabled": True, "ingressFrom": [peer]}})
    _, own = policy(release)["ingress"][0]["from"]
    labels = release.one("Pod")["metadata"]["labels"].items()
    assert labels >= own["podSelector"]["matchLabels"].items()
    assert (
        not release.deployment["template"]["metadata"]["labels"].items()
        >= own["podSelector"]["matchLabels"].items()
    )


def test_an_ingress_does_not_hold_a_stream_back_and_shows_only_the_api(chart):
    ingress = chart({"ingress": {"enabled": True, "hosts": ["a.example.org"]}}).one("Ingress")
    annotations = ingress["metadata"]["annotations"]
    prefix = "nginx.ingress.kubernetes.io"
    assert annotations[f"{prefix}/proxy-buffering"] == "off"
    assert int(annotations[f"{prefix}/proxy-read-timeout"]) >= 600
    # nginx asks the next replica only while it has the body, and for a POST only when it is told to.
    assert f"{prefix}/proxy-request-buffering" not in annotations
    assert {"error", "http_503", "non_idempotent"} <= set(
        annotations[f"{prefix}/proxy-next-upstream"].split()
    )
    (rule,) = ingress["spec"]["rules"]
    (path,) = rule["http"]["paths"]
    assert (path["path"], path["pathType"]) == ("/v1", "Prefix")
    assert path["backend"]["service"] == {"name": "test-snugfit", "port": {"name": "http"}}


def test_a_route_gives_the_last_token_of_a_long_answer_its_time(chart):
    values = {"gateway": {"enabled": True, "parentRefs": [{"name": "public"}]}, "service": {"port": 80}}
    (rule,) = chart(values).one("HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "3600s", "backendRequest": "3600s"}
    assert rule["backendRefs"] == [{"name": "test-snugfit", "port": 80}]
    assert rule["matches"] == [{"path": {"type": "PathPrefix", "value": "/v1"}}]


def test_the_service_selects_the_services_pods_and_not_the_exporters(chart, export_values):
    release = chart(export_values)
    selector = release.one("Service")["spec"]["selector"].items()
    assert release.deployment["template"]["metadata"]["labels"].items() >= selector
    assert not release.job["template"]["metadata"]["labels"].items() >= selector


def test_a_test_of_the_release_asks_whether_it_is_ready(chart):
    release = chart({"service": {"port": 80}})
    (container,) = release.one("Pod")["spec"]["containers"]
    assert container["args"][-1] == "http://test-snugfit:80/ready"
    compile(container["args"][0], "test", "exec")
