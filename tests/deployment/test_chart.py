"""`make chart` fails when something is wrong and says what it skips."""

import pytest

from deployment import chart, tools
from deployment.outcome import Failed, told
from deployment.rendering import documents


@pytest.fixture
def a_chart(tmp_path, monkeypatch):
    """The steps that need no rendering work on nothing; each test breaks or hides one thing."""
    monkeypatch.setattr(chart, "OUT", tmp_path)
    return tmp_path


def test_without_a_helm_it_says_what_is_skipped(a_chart, monkeypatch, capsys):
    monkeypatch.setattr(tools, "helm", lambda major: None)
    assert chart.main() == 0
    assert "SKIPPED  what takes a Helm" in capsys.readouterr().out


def test_a_step_that_finds_something_fails_the_run(a_chart, monkeypatch, capsys):
    def wrong():
        raise Failed("README.md out of date")

    monkeypatch.setattr(tools, "helm", lambda major: None)
    monkeypatch.setattr(chart, "_made", wrong)
    assert chart.main() == 1
    assert "FAILED   README.md and schema: README.md out of date" in capsys.readouterr().out


def test_helms_that_render_differently_are_an_error(a_chart, monkeypatch):
    monkeypatch.setattr(chart, "render", lambda helm, *values, **how: f"kind: {helm}")
    with pytest.raises(Failed, match="the Helms render it differently"):
        chart._render_all(["helm3", "helm4"])


def test_a_key_that_is_there_twice_is_an_error(a_chart, monkeypatch):
    twice = "kind: Pod\nmetadata:\n  annotations: {a: b}\n  annotations: {c: d}\n"
    monkeypatch.setattr(chart, "render", lambda helm, *values, **how: twice)
    with pytest.raises(Failed, match=r"values\.yaml for 1\.31: line 4: the key annotations is there twice"):
        chart._render_all(["helm4"])


@pytest.mark.parametrize("text", ["1e3", "1.5e3", "y", "N", "on", "true", "123"])
def test_what_go_takes_for_a_number_or_a_truth_is_no_text(text):
    (found,) = documents(f"name: {text}")
    assert not isinstance(found["name"], str)
    assert documents(f'name: "{text}"') == [{"name": text}]


def test_pods_that_start_anew_when_the_exporter_is_switched_off_are_an_error(a_chart, monkeypatch):
    def rendered(helm, files, values=None, **how):
        waits = "[]" if values else "[{name: wait-for-export}]"
        return f"kind: Deployment\nspec: {{template: {{spec: {{initContainers: {waits}}}}}}}\n"

    monkeypatch.setattr(chart, "render", rendered)
    with pytest.raises(Failed, match=r"exporter\.enabled: false starts the pods of the service anew"):
        chart._switch_off(["helm4"])


def test_values_that_are_not_refused_are_an_error(a_chart, monkeypatch):
    monkeypatch.setattr(chart, "render", lambda helm, **how: "")
    with pytest.raises(Failed, match="a value that does not exist: not refused by"):
        chart._refuse_all([tools.TOOLS / "helm-4" / "helm"])


def test_a_refusal_for_another_reason_is_an_error(a_chart, monkeypatch):
    def refuse(helm, **how):
        raise chart.Refused("the chart is broken")

    monkeypatch.setattr(chart, "render", refuse)
    with pytest.raises(Failed, match="refused, but not because of that: the chart is broken"):
        chart._refuse_all([tools.TOOLS / "helm-4" / "helm"])


def test_a_fault_in_a_manifest_is_told_with_its_set_of_values(a_chart):
    for file in chart.values_files():
        for minor in chart.KUBERNETES:
            chart._rendered(file, minor).write_text("kind: Service\n")
    with pytest.raises(Failed, match=r"gpu-values\.yaml: Service is odd"):
        chart._check(lambda found, file: [f"{found[0]['kind']} is odd"])


@pytest.mark.parametrize("tool", ["kubernetes_validate", "kubernetes_models"])
def test_a_check_without_its_tool_is_skipped_and_not_passed(a_chart, monkeypatch, tool):
    monkeypatch.setattr(tools, tool, lambda: None)
    step = {"kubernetes_validate": chart._validate, "kubernetes_models": chart._check_custom}[tool]
    arguments = ["1.37"] if step is chart._validate else []
    assert told("this", step, *arguments).startswith("SKIPPED  this: ")


@pytest.mark.parametrize(("passes", "told_as"), [(2, "ok "), (1, "FAILED"), (3, "FAILED")])
def test_a_manifest_that_the_validator_left_out_is_an_error(a_chart, monkeypatch, passes, told_as):
    """Two are Kubernetes' own; the validator says that it has no schema of the third."""
    for number, file in enumerate(chart.values_files()):
        kinds = ("Service", "ConfigMap", "ScaledObject") if number == 0 else ()
        chart._rendered(file, "1.37").write_text("---\n".join(f"kind: {kind}\n" for kind in kinds))
    program = a_chart / "kubernetes-validate"
    says = [*passes * ["INFO passed for resource x"], f"INFO {chart._CUSTOM}ScaledObject"]
    program.write_text("#!/bin/sh\n" + "".join(f'echo "{line}"\n' for line in says))
    program.chmod(0o755)
    monkeypatch.setattr(tools, "kubernetes_validate", lambda: program)
    assert told("this", chart._validate, "1.37").startswith(told_as)
