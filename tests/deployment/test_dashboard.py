import json
import re
from itertools import combinations

import pytest

from deployment.monitoring import charts
from deployment.monitoring.command import filled_in
from deployment.monitoring.dashboard import COLUMNS, DASHBOARD, dashboard, text
from deployment.monitoring.metric_names import asked_for, exposed

MODEL = json.loads(DASHBOARD.read_text())
PANELS = [panel for panel in MODEL["panels"] if panel["type"] != "row"]
TARGETS = [target for panel in PANELS for target in panel["targets"]]
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


@pytest.fixture(scope="module")
def names():
    return exposed()


def test_the_file_is_what_the_program_writes():
    assert DASHBOARD.read_text() == text(), "run python -m deployment.monitoring.dashboard"


def test_every_query_asks_for_what_the_service_exposes(names):
    for target in TARGETS:
        asked = asked_for(target["expr"])
        assert asked, target["expr"]
        assert asked <= names, asked - names


def test_every_variable_asks_for_what_the_service_exposes(names):
    queries = [one["query"]["query"] for one in MODEL["templating"]["list"] if one["type"] == "query"]
    assert len(queries) == 4
    for query in queries:
        assert asked_for(query) <= names


def test_ids_are_unique():
    ids = [panel["id"] for panel in MODEL["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]
        assert len(set(references)) == len(references)


def test_panels_lie_beside_each_other_within_the_grid():
    for panel in MODEL["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0
        assert place["x"] + place["w"] <= COLUMNS
    for one, other in combinations(MODEL["panels"], 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (one["title"], other["title"])


def test_everything_asks_the_data_source_that_the_viewer_has_chosen():
    variables = MODEL["templating"]["list"]
    assert (variables[0]["name"], variables[0]["type"]) == ("datasource", "datasource")
    queried = [*PANELS, *TARGETS, *variables[1:]]
    assert [one["datasource"] for one in queried] == [SOURCE] * len(queried)


def test_every_panel_has_a_title_and_a_unit():
    for panel in PANELS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in (
            "short",
            "reqps",
            "ops",
            "percentunit",
            "s",
            "bytes",
        )


def test_every_query_is_of_the_instances_that_the_viewer_has_chosen():
    for target in TARGETS:
        selectors = re.findall(r"\{([^{}]*)\}", target["expr"])
        assert len(selectors) >= len(asked_for(target["expr"]))
        for selector in selectors:
            assert selector.startswith('namespace=~"$namespace", job=~"$job", instance=~"$instance"')


def test_without_a_choice_series_without_a_namespace_are_there_too():
    """Outside a cluster none has one; and what is chosen narrows what comes after."""
    namespace, job, *others = (one for one in MODEL["templating"]["list"] if one["type"] == "query")
    assert (namespace["name"], namespace["allValue"], namespace["current"]["value"]) == (
        "namespace", ".*", ["$__all"],
    )  # fmt: skip
    assert '{namespace=~"$namespace"}' in job["query"]["query"]
    assert all('{namespace=~"$namespace", job=~"$job"}' in one["query"]["query"] for one in others)


def test_the_check_against_prometheus_leaves_no_variable_of_grafanas():
    for target in TARGETS:
        assert "$" not in filled_in(target["expr"])


def test_a_change_of_the_panels_changes_the_file():
    """So the comparison above compares something."""
    assert dashboard(())["panels"] == []


@pytest.mark.parametrize(
    ("value", "unit", "words"),
    [
        (0.0042, "s", "4.2 ms"),
        (0, "s", "0 s"),
        (3 * 2**30, "bytes", "3 GiB"),
        (0, "bytes", "0 B"),
        (0.0725, "percentunit", "7.25 %"),
        (12_345.6, "short", "12,346"),
        (2.5, "reqps", "2.5 req/s"),
    ],
)
def test_values_in_the_picture_are_said_as_grafana_would(value, unit, words):
    assert charts.said(value, unit) == words


@pytest.mark.parametrize("kind", ["timeseries", "stat", "bargauge"])
def test_a_panel_without_data_is_drawn_all_the_same(kind):
    drawn = charts.draw(charts.Chart("Title <1>", kind, "s", {}, 40, None, 400, 200), 0, 0)
    assert drawn.startswith("<svg")
    assert "Title &lt;1&gt;" in drawn
