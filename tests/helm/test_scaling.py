"""More than one replica: by hand, by queue depth, and when nodes are emptied."""

import pytest

from deployment.rendering import Refused
from service.metrics.engine import OURS

KEDA = {"enabled": True, "kind": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}


def test_replicas_follow_the_waiting_requests_of_each_pod(chart):
    release = chart(
        {"autoscaling": {"enabled": True, "minReplicas": 2, "maxReplicas": 6, "queuePerReplica": 8}}
    )
    scaler = release.one("HorizontalPodAutoscaler")
    (metric,) = scaler["spec"]["metrics"]
    assert scaler["apiVersion"] == "autoscaling/v2"
    assert metric["type"] == "Pods"
    assert metric["pods"]["metric"]["name"] in OURS.gauges
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "8"}
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (2, 6)


@pytest.mark.parametrize("scaling", [{"enabled": True}, KEDA], ids=["hpa", "keda"])
def test_what_scales_the_deployment_is_not_overruled_by_it(chart, scaling):
    release = chart({"autoscaling": scaling})
    scalers = release.all("HorizontalPodAutoscaler") + release.all("ScaledObject")
    assert [scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers] == ["test-snugfit"]
    assert "replicas" not in release.deployment


def test_keda_asks_prometheus_for_this_releases_queue(chart):
    (trigger,) = chart({"autoscaling": KEDA}).one("ScaledObject")["spec"]["triggers"]
    query = 'sum(snugfit_requests_waiting{namespace="models",service="test-snugfit"})'
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus:9090",
        "query": query,
        "threshold": "4",
    }
    assert trigger["metricType"] == "AverageValue"


def test_both_scale_at_the_same_pace(chart):
    own = chart({"autoscaling": {"enabled": True}}).one("HorizontalPodAutoscaler")["spec"]["behavior"]
    advanced = chart({"autoscaling": KEDA}).one("ScaledObject")["spec"]["advanced"]
    assert advanced["horizontalPodAutoscalerConfig"]["behavior"] == own


def test_a_query_of_ones_own_replaces_it(chart):
    keda = {**KEDA["keda"], "query": "sum(x)"}
    (trigger,) = chart({"autoscaling": {**KEDA, "keda": keda}}).one("ScaledObject")["spec"]["triggers"]
    assert trigger["metadata"]["query"] == "sum(x)"


def test_scaled_to_many_on_a_volume_that_one_node_has_is_refused_with_the_way_out(chart):
    values = {
        "config": {"model": "/models/m"},
        "model": {"source": "pvc"},
        "persistence": {"accessMode": "ReadWriteOnce"},
        "autoscaling": {"enabled": True, "maxReplicas": 3},
    }
    with pytest.raises(Refused, match=r"3 replicas cannot share .* Use a storage class with ReadWriteMany"):
        chart(values)
    values["autoscaling"]["maxReplicas"] = 1
    assert chart(values).one("HorizontalPodAutoscaler")


def test_nodes_are_emptied_one_pod_at_a_time_and_broken_pods_do_not_hinder_it(chart):
    release = chart({"podDisruptionBudget": {"enabled": True}})
    budget = release.one("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert budget["selector"] == release.deployment["selector"]


def test_with_no_replica_only_the_exporter_runs(chart, export_values):
    del export_values["config"]
    release = chart({**export_values, "replicaCount": 0})
    assert release.deployment["replicas"] == 0
    assert release.one("Job")
