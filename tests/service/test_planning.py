"""From settings to a plan, over checkpoints of which only the headers are there."""

import os

import psutil
import pytest

from benchmarks.make_model import make
from loader.errors import BadBudget, BadPlanRequest, BudgetExceeded, NotAModel
from service import planning
from service.planning import BUILTIN_NAME, make_plan_for, model_source, served_name
from service.settings import Settings

GB = 10**9


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make("tiny", tmp_path_factory.mktemp("models") / "tiny", headers_only=True))


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """15.23 GB of weights, in sparse files."""
    return str(make("7b", tmp_path_factory.mktemp("models") / "large", headers_only=True))


def settings(model, **more):
    return Settings(model=model, **more)


def on_cpu(model, **more):
    return settings(model, **{"device": "cpu", "budget": "1GB", **more})


def test_without_a_model_the_built_in_one_is_served_under_its_own_name():
    assert served_name(Settings()) == BUILTIN_NAME
    assert model_source(Settings()) == os.path.join(os.path.dirname(planning.__file__), "demo")


def test_a_folder_is_served_under_its_name_however_it_is_written(tiny, monkeypatch):
    for written in (tiny, tiny + os.sep, os.path.join(tiny, "..", "tiny")):
        assert served_name(settings(written)) == "tiny"
        assert model_source(settings(written)) == written
    monkeypatch.chdir(tiny)
    assert served_name(settings(".")) == "tiny"


def test_a_hub_model_is_served_under_its_id():
    assert served_name(settings("owner/name")) == "owner/name"
    assert model_source(settings("owner/name")) == "owner/name"


def test_a_name_that_is_set_wins(tiny):
    for model in (None, tiny, "owner/name"):
        assert served_name(settings(model, served_model_name="mine")) == "mine"


def test_what_the_settings_say_is_what_is_planned(tiny):
    plan = make_plan_for(on_cpu(tiny, context=777, concurrency=3, dtype="float32"))
    assert (plan.context, plan.concurrency, plan.dtype) == (777, 3, "float32")
    assert plan.budget.compute == ("cpu",)
    assert plan.budget.limits["cpu"] == GB
    assert plan.budget.origin == "--budget 1GB"
    assert plan.spec.source == tiny


def test_limits_device_by_device_are_an_alternative_to_a_budget(tiny):
    plan = make_plan_for(settings(tiny, max_memory="cpu=300MB,disk=1GB"))
    assert plan.budget.compute == ("cpu",)
    assert plan.budget.limits == {"cpu": 300_000_000, "disk": GB}


def test_a_share_is_of_what_is_free_on_this_machine(tiny):
    plans = [make_plan_for(on_cpu(tiny, budget=share)) for share in ("50%", "90%")]
    half, most = (plan.budget.limits["cpu"] for plan in plans)
    assert 0 < half < most < psutil.virtual_memory().total


def test_with_no_budget_there_is_one_from_what_is_free_and_the_plan_says_so(tiny):
    plan = make_plan_for(settings(tiny, device="cpu"))
    assert plan.budget.default
    assert "available RAM" in plan.budget.origin


def test_a_card_is_planned_for_that_this_machine_need_not_have(large):
    plan = make_plan_for(settings(large), gpu="16GiB")
    assert plan.budget.compute == ("cuda:0",)
    assert plan.main_device == "cuda:0"
    assert plan.spec.file_bytes == 15_231_233_024
    assert plan.devices[0].peak_bytes <= plan.budget.limits["cuda:0"] < 16 * 2**30


def test_the_same_settings_give_the_same_plan(tiny):
    assert make_plan_for(on_cpu(tiny)).to_json() == make_plan_for(on_cpu(tiny)).to_json()


def test_a_budget_that_is_none_is_refused_before_the_model_is_looked_at():
    with pytest.raises(BadBudget, match="much"):
        make_plan_for(on_cpu("no/such/folder/at/all", budget="much"))


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"budget": "1MB"}, BudgetExceeded, "does not fit"),
        ({"context": 40_000}, BadPlanRequest, "32,768"),
        ({"revision": "main"}, BadPlanRequest, "is a folder"),
        ({"model": "no/such/folder/at/all"}, NotAModel, "no such folder"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_the_loaders_own_error(tiny, more, error, words):
    with pytest.raises(error, match=words):
        make_plan_for(on_cpu(**{"model": tiny, **more}))
