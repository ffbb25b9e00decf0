"""More than one replica: by hand, by queue depth, and when nodes are emptied."""

import pytest

from deployment.rendering import Refused
from service.metrics.engine import OURS

KEDA = {"enabled": True, "kind": "keda", "keda": {"serverAddress": "http://prometheus:9090"}}
MONITOR = {"serviceMonitor": {"enabled": True}}


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


def test_what_runs_can_hold_on_to_replicas_that_the_queue_would_let_go(chart):
    scaling = {"enabled": True, "runningPerReplica": 22}
    queue, running = chart({"autoscaling": scaling}).one("HorizontalPodAutoscaler")["spec"]["metrics"]
    assert queue["pods"]["metric"]["name"] == "snugfit_requests_waiting"
    assert running["pods"]["metric"]["name"] == "snugfit_requests_running"
    assert running["pods"]["metric"]["name"] in OURS.gauges
    assert running["pods"]["target"] == {"type": "AverageValue", "averageValue": "22"}


@pytest.mark.parametrize("scaling", [{"enabled": True}, KEDA], ids=["hpa", "keda"])
def test_what_scales_the_deployment_is_not_overruled_by_it(chart, scaling):
    release = chart({"autoscaling": scaling, **MONITOR})
    scalers = release.all("HorizontalPodAutoscaler") + release.all("ScaledObject")
    assert [scaler["spec"]["scaleTargetRef"]["name"] for scaler in scalers] == ["test-snugfit"]
    assert "replicas" not in release.deployment


def test_keda_asks_prometheus_for_this_releases_queue(chart):
    (trigger,) = chart({"autoscaling": KEDA, **MONITOR}).one("ScaledObject")["spec"]["triggers"]
    query = 'sum(snugfit_requests_waiting{namespace="models",service="test-snugfit"})'
    assert trigger["metadata"] == {
        "serverAddress": "http://prometheus:9090",
        "query": query,
        "threshold": "4",
        "ignoreNullValues": "false",
    }
    assert trigger["metricType"] == "AverageValue"


def test_keda_asks_for_what_runs_too(chart):
    release = chart({"autoscaling": {**KEDA, "runningPerReplica": 22}, **MONITOR})
    queue, running = release.one("ScaledObject")["spec"]["triggers"]
    query = queue["metadata"]["query"].replace("waiting", "running")
    assert running == {**queue, "metadata": {**queue["metadata"], "query": query, "threshold": "22"}}


def test_both_scale_at_the_same_pace(chart):
    own = chart({"autoscaling": {"enabled": True}}).one("HorizontalPodAutoscaler")["spec"]["behavior"]
    advanced = chart({"autoscaling": KEDA, **MONITOR}).one("ScaledObject")["spec"]["advanced"]
    assert advanced["horizontalPodAutoscalerConfig"]["behavior"] == own


def test_queries_of_ones_own_replace_them(chart):
    keda = {**KEDA["keda"], "query": "sum(x)", "runningQuery": "sum(y)"}
    scaling = {**KEDA, "runningPerReplica": 22, "keda": keda}
    triggers = chart({"autoscaling": scaling}).one("ScaledObject")["spec"]["triggers"]
    assert [trigger["metadata"]["query"] for trigger in triggers] == ["sum(x)", "sum(y)"]


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
    assert not release.all("Pod"), "`helm test` would ask a service that is not there"
