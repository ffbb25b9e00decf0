import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deployment.monitoring.metric_names import asked_for, exposed

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "helm" / "rules" / "snugfit.yaml"
TEST = Path(__file__).with_name("rules_test.yaml")
RUNBOOK = ROOT / "docs" / "alerts.md"

ALL = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
ALERTS = {rule["alert"]: rule for rule in ALL if "alert" in rule}
RECORDS = {rule["record"]: rule for rule in ALL if "record" in rule}
TESTED = [case for group in yaml.safe_load(TEST.read_text())["tests"] for case in group["alert_rule_test"]]


@pytest.fixture(scope="module")
def names():
    return exposed()


@pytest.mark.parametrize("arguments", [["check", "rules", RULES], ["test", "rules", TEST]])
def test_promtool_takes_the_rules_and_their_tests_pass(arguments):
    promtool = shutil.which("promtool")
    if not promtool:
        pytest.skip("no promtool: the rules are NOT tested; apt-get install prometheus")
    ended = subprocess.run([promtool, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_is_tested_when_it_fires_and_when_it_does_not(alert):
    expected = [bool(case["exp_alerts"]) for case in TESTED if case["alertname"] == alert]
    assert set(expected) == {True, False}
    assert expected.count(False) > 1, "it is only tested with nothing there"


def test_no_test_is_about_an_alert_that_is_gone():
    """promtool takes such a test and finds that nothing fires."""
    assert {case["alertname"] for case in TESTED} == set(ALERTS)


@pytest.mark.parametrize("rule", ALL, ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_ask_for_nothing_but_what_the_service_exposes_and_rules_record(rule, names):
    assert asked_for(rule["expr"]) <= names
    recorded = set(re.findall(r"\b\w+:\w+:\w+", rule["expr"]))
    assert recorded <= set(RECORDS)
    assert asked_for(rule["expr"]) or recorded or "kube_job_failed" in rule["expr"]


@pytest.mark.parametrize("alert", ALERTS)
def test_each_alert_says_how_bad_it_is_and_where_to_read_on(alert):
    rule = ALERTS[alert]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]
    assert rule["annotations"]["description"]
    assert rule["annotations"]["runbook"] == f"docs/alerts.md#{alert.lower()}"


def test_the_runbook_has_a_section_for_each_alert_in_the_same_order():
    assert re.findall(r"^### (Snugfit\w+)$", RUNBOOK.read_text(), re.MULTILINE) == list(ALERTS)


def test_recording_rules_are_named_by_level_metric_and_operation():
    assert RECORDS
    for name in RECORDS:
        assert re.fullmatch(r"[a-z_]+:snugfit_[a-z_]+:[a-z0-9_]+", name), name


def test_every_recording_rule_is_used_by_an_alert_or_another_rule():
    for name in RECORDS:
        assert any(name in rule["expr"] for rule in ALL), name


def test_rules_name_no_host():
    assert "://" not in RULES.read_text()
