"""deployment/capacity.py: arithmetic over real plans, and queueing theory's own figures where they exist."""

import io
import json
import math
import sys
from dataclasses import replace

import pytest

from benchmarks.make_model import make
from deployment.capacity import Card, Fit, Load, OutOfReach, Replica, main, replicas_for, step_seconds, under
from service.plan_command import run as plan_command

CARD = Card(read_bytes_per_second=200e9, operations_per_second=60e12, copy_bytes_per_second=10e9)
LOAD = Load(rate=6.0, prompt_tokens=512, output_tokens=128, ttft_seconds=2.0, itl_seconds=0.1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make("7b", tmp_path_factory.mktemp("models") / "7b", headers_only=True)


@pytest.fixture
def plan(model, capsys):
    """`plan("24GB")`: what `snugfit plan --json` prints for a 7B on such a card."""

    def printed(card, *flags):
        plan_command([str(model), "--gpu", card, "--json", *flags])
        return capsys.readouterr().out

    return printed


@pytest.fixture
def replica(plan):
    return Replica(Fit.of(json.loads(plan("24GB"))), CARD, LOAD)


def even(replica, rows, output_tokens=11):
    """The same replica on a card on which a request takes as long in any company."""
    fit = replace(replica.fit, kv_bytes_per_token=0, rows=rows)
    card = Card(read_bytes_per_second=fit.resident_bytes / 0.1, operations_per_second=1e30)
    return Replica(fit, card, Load(1.0, 1, output_tokens))


def test_a_step_reads_all_weights_once_and_copies_the_offloaded_ones(plan):
    fit = Fit.of(json.loads(plan("16GB")))
    alone = step_seconds(fit, CARD, rows=1, kv_tokens=0)
    assert alone == pytest.approx(fit.resident_bytes / 200e9 + fit.offloaded_bytes / 10e9)
    assert step_seconds(fit, CARD, rows=2, kv_tokens=0) == alone


def test_a_long_prompt_takes_what_its_products_take(replica):
    takes = step_seconds(replica.fit, CARD, rows=0, kv_tokens=0, prompt_tokens=2048)
    assert takes == pytest.approx(2 * replica.fit.parameters * 2048 / 60e12)


def test_places_are_the_smallest_of_pool_rows_and_target(replica):
    rows, what = replica.most_rows()
    assert what == "the ITL target"
    assert replica.itl_seconds(rows) <= 0.1 < replica.itl_seconds(rows + 1)
    patient = replace(replica, load=replace(LOAD, itl_seconds=math.inf))
    assert patient.most_rows() == (64, "--concurrency")
    long = replace(patient, load=replace(LOAD, itl_seconds=math.inf, prompt_tokens=6000, output_tokens=2000))
    assert long.most_rows() == (126_976 // 8192, "the KV pool")


@pytest.mark.parametrize(
    ("places", "busy", "waits"), [(1, 0.5, 0.5), (2, 0.75, 0.642857), (5, 0.8, 0.554113)]
)
def test_where_company_costs_nothing_waiting_is_erlangs(replica, places, busy, waits):
    """The shares that wait are those of Erlang C; their mean number is that times busy / (1 - busy)."""
    same = even(replica, places)
    found = under(same, busy * same.rate(places), places)
    assert found.waiting == pytest.approx(waits * busy / (1 - busy), rel=1e-4)
    assert found.rows == pytest.approx(busy * places)


def test_a_replica_with_more_than_it_can_do_has_no_steady_state(replica):
    most = replica.rate(16)
    assert under(replica, most, 16) is None
    assert under(replica, 0.9 * most, 16) is not None


def test_the_fewest_replicas_that_meet_the_target_are_told(replica):
    answer = replicas_for(replica)
    assert answer.service.ttft_p99_seconds <= 2.0
    fewer = under(replica, LOAD.rate / (answer.replicas - 1), answer.rows)
    assert fewer is None or fewer.ttft_p99_seconds > 2.0


def test_a_spare_replica_takes_its_part_of_the_load_while_it_is_there(replica):
    needed, spared = replicas_for(replica), replicas_for(replica, spare=1)
    assert spared.replicas == needed.replicas + 1
    assert spared.service == under(replica, LOAD.rate / spared.replicas, spared.rows)
    assert spared.service.rows < needed.service.rows


def test_the_memory_of_all_cards_of_a_plan_counts_and_ram_beside_them_does_not(plan, model, capsys):
    plan_command([str(model), "--max-memory", "0=10GiB,1=10GiB,cpu=8GiB", "--json"])
    two = json.loads(capsys.readouterr().out)
    peaks = {device["device"]: device["peak_bytes"] for device in two["devices"]}
    assert Fit.of(two).device_bytes == peaks["cuda:0"] + peaks["cuda:1"]
    offloaded = json.loads(plan("16GB"))
    assert [device["device"] for device in offloaded["devices"]] == ["cuda:0", "cpu"]
    assert Fit.of(offloaded).device_bytes == offloaded["devices"][0]["peak_bytes"]


def test_a_pool_that_holds_no_such_request_is_told_apart_from_the_context(replica):
    small = replace(replica, fit=replace(replica.fit, blocks=2))
    with pytest.raises(OutOfReach, match="a request has 640 tokens and the KV pool 512"):
        replicas_for(small)


def test_reused_prompts_take_fewer_replicas(replica):
    long = replace(LOAD, prompt_tokens=3000, rate=10.0)
    again = replace(long, reused=0.8)
    assert (
        replicas_for(replace(replica, load=again)).replicas
        < replicas_for(replace(replica, load=long)).replicas
    )


@pytest.mark.parametrize(
    ("card", "change", "message"),
    [
        ("16GB", {}, "a request alone has 117 ms between tokens, and the target is 100 ms"),
        ("24GB", {"prompt_tokens": 9000}, "a request has 9128 tokens and the context is 8192"),
        ("24GB", {"ttft_seconds": 0.1}, "the prompt alone takes 0.1"),
    ],
)
def test_what_no_number_of_replicas_reaches_is_refused_with_numbers(plan, card, change, message):
    fit = Fit.of(json.loads(plan(card)))
    with pytest.raises(OutOfReach, match=message):
        replicas_for(Replica(fit, CARD, replace(LOAD, **change)))


def test_a_plan_that_does_not_fit_is_refused_with_its_hint(plan):
    with pytest.raises(OutOfReach, match=r"does not fit: \w"):
        Fit.of(json.loads(plan("1GB")))


def test_the_command_reads_a_plan_from_stdin_and_prints_costs(plan, monkeypatch, capsys):
    load = [
        "--rate",
        "6",
        "--prompt",
        "512",
        "--output",
        "128",
        "--ttft",
        "2",
        "--itl",
        "0.1",
        "--read",
        "200",
        "--tflops",
        "60",
        "--price",
        "2",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO(plan("24GB")))
    monkeypatch.setattr(sys, "argv", ["capacity", "-", *load])
    main()
    told = json.loads(capsys.readouterr().out)
    assert told["cost_per_hour"] == 2 * told["replicas"]
    tokens_per_hour = 3600 * 6 * 128
    expected = 1e6 * told["cost_per_hour"] / tokens_per_hour
    assert told["cost_per_million_output_tokens"] == pytest.approx(expected, abs=0.01)
