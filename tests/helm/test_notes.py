"""What `helm install` tells when it is done."""

import pytest

from deployment.rendering import notes

MODEL = {"config": {"model": "owner/name"}}


@pytest.fixture
def told(helm):
    return lambda values: notes(helm, values)


def test_the_built_in_model_needs_no_plan(told):
    text = told({})
    assert "rollout status" in text
    assert "port-forward" in text
    assert "No API key is asked for." in text
    assert "snugfit plan" not in text


def test_a_model_without_a_plan_is_told_how_to_make_one(told):
    text = told(MODEL)
    assert "(1Gi, no GPU) and fit the built-in model only" in text
    assert "snugfit plan owner/name --gpu SIZE" in text


def test_of_a_model_on_a_volume_what_it_was_made_from_may_be_planned(told, export_values):
    text = told(export_values)
    assert "MODEL is /models/merged where you have it, or the 16-bit model that it was made from." in text


def test_with_a_plan_nothing_more_is_said_of_it(told):
    planned = {**MODEL, "resources": {"limits": {"memory": "8Gi"}}}
    assert "startupProbe is the chart's own" in told(planned)
    assert "snugfit plan" not in told({**planned, "startupProbe": {"failureThreshold": 20}})


def test_the_secret_that_has_to_be_there_is_named(told):
    text = told({"apiKeys": {"existingSecret": "mine", "key": "all"}})
    assert "Secret mine must exist in this namespace and have the key all." in text
    assert "Authorization: Bearer" in text
    assert "No API key" not in text


def test_a_claim_that_is_made_may_stay_pending(told, export_values):
    text = told(export_values)
    assert "stays Pending, this says why (most cloud disks cannot be ReadWriteMany)." in text
    assert "describe pvc test-snugfit-models" in text
    assert "Pending" not in told({**export_values, "persistence": {"existingClaim": "shared"}})


@pytest.mark.parametrize("word", ["rollout", "port-forward", "curl", "API key", "snugfit plan"])
def test_without_pods_only_the_export_is_spoken_of(told, export_values, word):
    text = told({**export_values, "replicaCount": 0})
    assert "logs -f job/test-snugfit-export-" in text
    assert "/models/merged is in the claim test-snugfit-models" in text
    assert word not in text


def test_without_pods_and_an_export_the_next_step_is_told(told):
    assert "set replicaCount" in told({"replicaCount": 0})
