import io
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from loader.budget import MemoryBudget
from loader.checkpoint import ModelSpec
from loader.errors import BudgetExceeded
from loader.kv_layout import KvGroup, KvLayout
from loader.plan import ONE_AT_A_TIME, DevicePlan, Plan
from service.show import PARTS, picture, print_misfit, print_plan, shares, short_map, size

GPU = DevicePlan(
    "cuda:0", 16 * 10**9, 12_600_000_000, 1_879_048_192, 80_000_000, 20_000_000, 466_000_000, 600_000_000
)
RAM = DevicePlan("cpu", 30 * 10**9, 2_631_233_024, 0, 0, 0, 0, 0)
PLAN = Plan(
    spec=ModelSpec("Qwen/Qwen2.5-7B-Instruct", None, {}, ()),
    budget=MemoryBudget(("cuda:0",), {"cuda:0": 16 * 10**9, "cpu": 30 * 10**9}, "--budget 16GB"),
    family="qwen2",
    exact=True,
    dtype="bfloat16",
    weights_bytes=15_231_233_024,
    resident_bytes=12_600_000_000,
    offloaded_bytes=2_631_233_024,
    kv_bytes_per_token=57_344,
    batching="continuous",
    kv=KvLayout(256, (KvGroup(None, tuple(range(28)), 128),)),
    context=16_384,
    concurrency=64,
    chunk_tokens=512,
    device_map={
        "model.embed_tokens": 0,
        **{f"model.layers.{i}": 0 for i in range(24)},
        **{f"model.layers.{i}": "cpu" for i in range(24, 28)},
        "model.norm": 0,
        "lm_head": 0,
    },
    max_memory={0: 16 * 10**9, "cpu": 30 * 10**9},
    devices=(GPU, RAM),
    given_up=(
        "context: 131,072 tokens would have been possible with more",
        "prefill chunk: 2,048 -> 512 tokens",
    ),
    notes=("A note.",),
)
PICTURE = """\
Qwen/Qwen2.5-7B-Instruct  qwen2, bfloat16, 15.23 GB of weights

cuda:0  WWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWWKKKKKKALSRR.  15.65 GB of 16.00 GB
cpu     WWWW............................................   2.63 GB of 30.00 GB

                  cuda:0       cpu
W  weights      12.60 GB   2.63 GB
K  KV cache      1.88 GB         -
A  activations   80.0 MB         -
L  logits        20.0 MB         -
S  staging      466.0 MB         -
R  reserve      600.0 MB         -
.  free         355.0 MB  27.37 GB
   budget       16.00 GB  30.00 GB

budget      --budget 16GB
context     16,384 tokens for one request
batching    continuous: up to 64 requests in one step
KV cache    32,768 tokens, shared in blocks of 256, 57,344 bytes each
prefill     in chunks of 512 tokens
offloaded   2.63 GB in RAM: read at every step, about 0.26 s at 10 GB/s
given up    context: 131,072 tokens would have been possible with more
            prefill chunk: 2,048 -> 512 tokens
device map  model.embed_tokens, model.layers.0-23, model.norm, lm_head -> cuda:0
            model.layers.24-27 -> cpu
note        A note.
"""


def printed(show, encoding="utf-8", **console):
    """What `show(console)` writes, without the blanks that pad a table's last column."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    show(Console(file=stream, **{"width": 80, **console}))
    stream.flush()
    return "\n".join(line.rstrip() for line in raw.getvalue().decode(encoding).rstrip().splitlines()) + "\n"


def test_the_picture_of_a_plan_in_a_pipe():
    assert printed(lambda console: print_plan(PLAN, console)) == PICTURE


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    lines = printed(lambda console: print_plan(PLAN, console), width=width).splitlines()
    assert max(map(len, lines)) <= min(width, 110)


def test_with_colour_the_bars_are_blocks():
    text = printed(lambda console: print_plan(PLAN, console), force_terminal=True, color_system="standard")
    assert "\u2588" in text
    assert "WWW" not in text


@pytest.mark.parametrize("options", [{"no_color": True}, {"encoding": "cp1252"}, {"encoding": "ascii"}])
def test_without_colour_or_utf_8_the_bars_are_letters(options):
    text = printed(
        lambda console: print_plan(PLAN, console), force_terminal=True, color_system="standard", **options
    )
    assert "WWW" in text
    assert "\u2588" not in text


def test_a_model_name_in_brackets_is_not_taken_for_markup():
    plan = replace(PLAN, spec=ModelSpec("models/[bold]x", None, {}, ()), notes=("[red]note",))
    text = printed(lambda console: print_plan(plan, console))
    assert "models/[bold]x" in text
    assert "[red]note" in text


def test_a_model_that_runs_one_request_at_a_time_is_shown_with_its_own_cache():
    plan = replace(PLAN, batching=ONE_AT_A_TIME, concurrency=1, context=1000)
    text = printed(lambda console: print_plan(plan, console))
    assert "\nbatching    one at a time\n" in text
    assert "\nKV cache    1,000 tokens of the model's own, 57,344 bytes each\n" in text


def test_an_estimate_is_labelled_as_one():
    assert "an estimate" in printed(lambda console: print_plan(replace(PLAN, exact=False), console))
    assert "an estimate" not in PICTURE


def test_a_plan_that_offloads_nothing_says_so():
    plan = replace(PLAN, offloaded_bytes=0, devices=(GPU,))
    assert "nothing: all 15.23 GB of weights stay on cuda:0" in printed(
        lambda console: print_plan(plan, console)
    )


def test_on_the_cpu_what_the_process_holds_anyway_is_a_line_of_its_own():
    plan = replace(PLAN, budget=MemoryBudget(("cpu",), {"cpu": 30 * 10**9}), devices=(RAM,))
    assert "beside it   440.4 MB: Python, torch and the model's class before loading" in printed(
        lambda console: print_plan(plan, console)
    )
    assert "beside it" not in PICTURE


def test_offloading_to_ram_and_disk_names_both_and_adds_their_times():
    disk = DevicePlan("disk", 10**11, 4 * 10**9, 0, 0, 0, 0, 0)
    text = printed(lambda console: print_plan(replace(PLAN, devices=(GPU, RAM, disk)), console), width=110)
    assert "2.63 GB in RAM and 4.00 GB on disk: read at every step, about 2.3 s at 10 and 2 GB/s" in text


def test_the_columns_of_a_bar_add_up_and_show_every_part_that_is_there():
    for cells in range(10, 100):
        columns = shares(GPU, cells)
        assert sum(columns) == cells
        assert all(count >= 1 for count in columns[: len(PARTS)])


def test_a_device_map_is_shortened_layer_by_layer():
    assert short_map({"": "cpu"}) == ["the whole model -> cpu"]
    split = {
        f"model.layers.{i}.{part}": place
        for i in range(4)
        for part, place in (("mlp", "cpu"), ("self_attn", 1))
    }
    assert short_map(split) == ["model.layers.0-3.mlp -> cpu", "model.layers.0-3.self_attn -> cuda:1"]
    assert short_map({"h.0": 0, "h.2": 0, "h.3": 0, "h.7": 0}) == ["h.0,2-3,7 -> cuda:0"]


def test_a_long_device_map_is_cut():
    assert short_map({f"part{'x' * i}": 0 for i in range(20)})[0].endswith(", and 14 more -> cuda:0")


def test_sizes_are_decimal():
    assert [size(n) for n in (0, 999, 1500, 64_000_000, 15_231_233_024)] == [
        "0 B", "999 B", "1.5 kB", "64.0 MB", "15.23 GB",
    ]  # fmt: skip


def test_a_model_that_does_not_fit_is_shown_with_a_command_that_would_work():
    err = BudgetExceeded("cuda:0", 5 * 10**9, 2 * 10**9, 4 * 10**9, "hint")
    command = "snugfit plan " + "x" * 100 + " --budget 4GB"
    text = printed(lambda console: print_misfit(err, command, console))
    assert "Does not fit on cuda:0" in text
    assert "smallest budget that works  4.00 GB" in text
    assert f"  {command}\n" in text, "a command to copy is not broken over lines"


def test_the_picture_for_the_readme_fetches_nothing_and_is_always_the_same():
    svg = picture(PLAN, "snugfit plan Qwen/Qwen2.5-7B-Instruct --budget 16GB")
    ElementTree.fromstring(svg)
    assert "url(" not in svg.replace("url(#", "")
    assert "--budget&#160;16GB" in svg
    assert svg == picture(PLAN, "snugfit plan Qwen/Qwen2.5-7B-Instruct --budget 16GB")
