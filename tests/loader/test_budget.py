"""loader/budget.py: sizes as people write them, and the budgets that the flags describe."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.budget import CUDA_CONTEXT_BYTES, STARTUP_BYTES, MemoryBudget, format_bytes, parse_bytes
from loader.errors import BadBudget, DeviceUnavailable
from loader.probe import Gpu, Machine

GIB = 2**30
# 10 % of the RAM is 3.2 GiB, so 20.8 GiB of what is free may hold offloaded weights.
NO_GPU = Machine(ram_total_bytes=32 * GIB, ram_free_bytes=24 * GIB)
OFFLOAD = {"cpu": 24 * GIB - 32 * GIB // 10}
ONE_GPU = Machine(32 * GIB, 24 * GIB, (Gpu("cuda:0", "A", "GPU-a", 16 * GIB, 15 * GIB),))
BIG = Gpu("cuda:0", "C", "GPU-c", 80 * GIB, 79 * GIB, multiprocessors=132)
TWO_GPUS = Machine(32 * GIB, 24 * GIB, (*ONE_GPU.gpus, Gpu("cuda:1", "B", "GPU-b", 8 * GIB, 7 * GIB)))


def parse(budget=None, max_memory=None, device="auto", machine=NO_GPU, gpu=None):
    return MemoryBudget.parse(budget, max_memory, device, machine, gpu)


# Sizes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("16GB", 16 * 10**9),
        ("15GiB", 15 * GIB),
        ("1.5 GB", 1_500_000_000),
        ("64MB", 64_000_000),
        ("500000000", 500_000_000),
        (" 16 gb ", 16 * 10**9),
        ("16gB", 16 * 10**9),
        ("2tib", 2 * 2**40),
        ("3TB", 3 * 10**12),
        ("7KiB", 7168),
        ("7kb", 7000),
        ("9B", 9),
        ("16G", 16 * 10**9),
        ("16Gi", 16 * GIB),
        ("512m", 512 * 10**6),
        (".5KiB", 512),
        ("0.1GB", 100_000_000),  # exact: 0.1 is not a float here
        ("1.0000000019GB", 1_000_000_001),
        ("90%", 900),
        ("12.5 %", 125),
        ("100%", 1000),
    ],
)
def test_sizes_are_read_as_people_write_them(text, n_bytes):
    assert parse_bytes(text, free_bytes=1000) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "GB", "16 apples", "16 GBs", "16EB", "0", "0GB", "0.4B", "-1GB", "+1GB", "nan", "inf", "1e9",
        "16,5GB", "1_000", "1.5", "16GB 2", "16 G B", "0x10", "²GB", "१६GB", "16\nGB2", "%", "0%", "101%",
        "-5%", "1.2.3GB", "16ib", "16bb", "16GGB", "16Gbit", "16.GB",
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_the_accepted_forms(text):
    with pytest.raises(BadBudget) as caught:
        parse_bytes(text, free_bytes=1000)
    if "%" not in text or text == "%":
        for form in ("16GB", "1.5GiB", "500000000", "90%"):
            assert form in str(caught.value)


@pytest.mark.parametrize("text", ["16Gb", "512Mb", "1Tb", "8Kb", "16Gib"])
def test_bits_are_refused_because_nobody_means_them(text):
    with pytest.raises(BadBudget, match=r"bits; write \w+B for bytes"):
        parse_bytes(text)


def test_a_percentage_of_something_unknown_is_refused():
    with pytest.raises(BadBudget, match="nobody knows what is free"):
        parse_bytes("90%")


def test_a_percentage_of_nothing_is_refused():
    with pytest.raises(BadBudget, match="nothing is free"):
        parse_bytes("90%", free_bytes=0)


@given(st.integers(1, 2**60))
def test_a_number_of_bytes_reads_as_itself(n_bytes):
    assert parse_bytes(str(n_bytes)) == parse_bytes(f"{n_bytes} B") == n_bytes


@given(st.integers(1, 9999), st.sampled_from("KMGT"))
def test_binary_units_are_powers_of_1024_and_decimal_ones_of_1000(number, letter):
    power = "KMGT".index(letter) + 1
    for unit in (f"{letter}iB", f"{letter}IB", f"{letter.lower()}ib", f"{letter}i"):
        assert parse_bytes(f"{number}{unit}") == number * 1024**power
    for unit in (f"{letter}B", f"{letter.lower()}B", f"{letter.lower()}b", letter):
        assert parse_bytes(f"{number}{unit}") == number * 1000**power


@given(st.integers(1, 2**53), st.booleans())
def test_what_is_printed_reads_as_the_same_within_its_digits(n_bytes, binary):
    assert parse_bytes(format_bytes(n_bytes, binary)) == pytest.approx(n_bytes, rel=0.0006, abs=1)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_refused(text):
    with suppress(BadBudget):
        assert parse_bytes(text, free_bytes=10**9) > 0


@pytest.mark.parametrize(
    ("n_bytes", "decimal", "binary"),
    [
        (0, "0 B", "0 B"),
        (999, "999 B", "999 B"),
        (1000, "1 KB", "1000 B"),
        (15_231_233_024, "15.23 GB", "14.19 GiB"),
        (466_100_000, "466.1 MB", "444.5 MiB"),
        (999_999, "1 MB", "976.6 KiB"),
        (16 * 2**30, "17.18 GB", "16 GiB"),
        (1010 * 2**20, "1.059 GB", "1010 MiB"),
        (5 * 10**15, "5000 TB", "4547 TiB"),
        (-2_500_000, "-2.5 MB", "-2.384 MiB"),
    ],
)
def test_sizes_are_printed_in_four_digits(n_bytes, decimal, binary):
    assert format_bytes(n_bytes) == decimal
    assert format_bytes(n_bytes, binary=True) == binary


# --budget, --device, --gpu


def test_a_budget_bounds_ram_where_the_cpu_computes():
    budget = parse("16GB")
    assert (budget.compute, budget.limits) == (("cpu",), {"cpu": 16 * 10**9})
    assert (budget.origin, budget.default) == ("--budget 16GB", False)


def test_a_budget_bounds_the_first_gpu_where_there_is_one():
    budget = parse("8GB", machine=TWO_GPUS)
    assert budget.compute == ("cuda:0",)
    assert budget.limits == {"cuda:0": 8 * 10**9, **OFFLOAD}


@pytest.mark.parametrize(
    ("device", "compute"),
    [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:0", "cuda:0"), ("cuda:1", "cuda:1"), ("cuda:01", "cuda:1")],
)
def test_the_device_that_is_asked_for_computes(device, compute):
    assert parse("5GB", device=device, machine=TWO_GPUS).compute == (compute,)


def test_a_percentage_is_of_what_is_free_on_the_device():
    assert parse("50%", machine=TWO_GPUS, device="cuda:1").limits["cuda:1"] == 7 * GIB // 2
    assert parse("50%", machine=TWO_GPUS, device="cpu").limits == {"cpu": 12 * GIB}


def test_with_a_budget_a_gpu_elsewhere_can_be_planned_for():
    assert parse("24GB", device="cuda").limits["cuda:0"] == 24 * 10**9


@pytest.mark.parametrize(
    ("card", "limit"),
    [("16GiB", 16 * GIB - 16 * GIB * 2 // 100), ("8GiB", 8 * GIB - 256 * 2**20), ("24GB", 23_520_000_000)],
)
def test_a_card_is_less_than_its_size(card, limit):
    budget = parse(gpu=card)
    assert (budget.compute, budget.limits) == (("cuda:0",), {"cuda:0": limit, **OFFLOAD})
    assert (budget.origin, budget.default) == (f"--gpu {card}", False)


def test_a_card_of_some_size_and_the_same_card_when_idle_give_the_same_limit():
    idle = Machine(32 * GIB, 24 * GIB, (Gpu("cuda:0", "A", "GPU-a", 16 * GIB, 16 * GIB),))
    assert parse(gpu="16GiB").limits == parse(machine=idle).limits


def test_a_budget_within_a_card_is_the_limit_and_one_beyond_it_is_refused():
    assert parse("10GB", gpu="16GiB").limits["cuda:0"] == 10**10
    assert parse("50%", gpu="16GiB").limits["cuda:0"] == (16 * GIB - 16 * GIB * 2 // 100) // 2
    with pytest.raises(BadBudget, match="of a card of 16GiB snugfit can use 16,836,271,801 bytes"):
        parse("16GiB", gpu="16GiB")


def test_with_nothing_given_a_gpu_is_used_but_for_a_margin():
    budget = parse(machine=ONE_GPU)
    assert budget.limits["cuda:0"] == 15 * GIB - 15 * GIB * 2 // 100
    assert budget.default
    assert "free on cuda:0" in budget.origin


def test_with_nothing_given_and_no_gpu_70_percent_of_available_ram_is_used():
    budget = parse()
    assert (budget.compute, budget.limits) == (("cpu",), {"cpu": 24 * GIB * 70 // 100})
    assert budget.default
    assert budget.origin == "70 % of 25.77 GB available RAM"


@pytest.mark.parametrize(("free", "wanted"), [(GIB, GIB - STARTUP_BYTES), (STARTUP_BYTES, 0), (1000, 0)])
def test_where_ram_is_short_the_process_itself_has_room_beside_the_budget(free, wanted):
    budget = parse(machine=Machine(ram_total_bytes=free, ram_free_bytes=free))
    assert budget.limits == {"cpu": wanted}
    assert "less what the process takes" in budget.origin


@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_gpu_that_is_not_there_needs_a_size(device):
    with pytest.raises(DeviceUnavailable, match="--gpu 16GiB"):
        parse(device=device)
    with pytest.raises(BadBudget, match="nobody knows what is free"):
        parse("90%", device=device)


@pytest.mark.parametrize("device", ["tpu", "gpu", "cuda:", "cuda:x", "CPU", "0", ""])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(BadBudget, match=r"auto, cpu, cuda or cuda:N"):
        parse("5GB", device=device)


def test_a_number_without_a_unit_is_not_taken_for_gigabytes_nor_for_bytes():
    with pytest.raises(BadBudget, match="With a unit: 16GB"):
        parse("16")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": "1GB", "max_memory": "cpu=1GB"}, "--budget and --max-memory"),
        ({"gpu": "1GB", "max_memory": "0=1GB"}, "--gpu and --max-memory"),
        ({"gpu": "16GB", "device": "cpu"}, "--gpu is the size of cuda:0, and --device is cpu"),
        ({"gpu": "16GB", "device": "cuda:1"}, "--device is cuda:1"),
        ({"gpu": "90%"}, "--gpu 90%: nobody knows"),
        ({"gpu": "200MB"}, "nothing is left"),
        ({"budget": "16 apples"}, "--budget 16 apples: 'apples' is no unit"),
    ],
)
def test_flags_that_contradict_each_other_or_make_no_sense_are_refused(arguments, message):
    with pytest.raises(BadBudget, match=message):
        parse(**arguments)


# --max-memory


def test_max_memory_is_accelerates_form():
    budget = parse(max_memory="0=15GiB,1=15GiB,cpu=30GiB,disk=100GB")
    assert budget.compute == ("cuda:0", "cuda:1")
    assert budget.limits == {
        "cuda:0": 15 * GIB, "cuda:1": 15 * GIB, "cpu": 30 * GIB, "disk": 100 * 10**9,
    }  # fmt: skip
    assert not budget.default


def test_gpus_compute_in_the_order_of_their_numbers():
    budget = parse(max_memory="disk=9GB, 10 = 1GB , 2=2GB")
    assert budget.compute == ("cuda:2", "cuda:10")
    assert list(budget.limits) == ["cuda:2", "cuda:10", "cpu", "disk"]


def test_without_a_gpu_in_it_the_cpu_computes_even_where_there_is_one():
    budget = parse(max_memory="cpu=4GB,disk=9GB", machine=ONE_GPU)
    assert (budget.compute, budget.limits) == (("cpu",), {"cpu": 4 * 10**9, "disk": 9 * 10**9})
    assert parse(max_memory="disk=9GB").limits["cpu"] == 24 * GIB * 70 // 100


def test_ram_beside_a_gpu_has_a_default_that_leaves_some_to_the_system():
    assert parse(max_memory="0=8GB").limits == {"cuda:0": 8 * 10**9, **OFFLOAD}
    small = Machine(ram_total_bytes=8 * 10**9, ram_free_bytes=3 * 10**9)
    assert parse(max_memory="0=8GB", machine=small).limits["cpu"] == 10**9
    full = Machine(ram_total_bytes=8 * 10**9, ram_free_bytes=10**9)
    assert parse(max_memory="0=8GB", machine=full).limits["cpu"] == 0


def test_a_place_for_offloaded_weights_can_be_turned_off():
    budget = parse(max_memory="0=8GB,cpu=0,disk=0")
    assert (budget.limits["cpu"], budget.limits["disk"]) == (0, 0)


def test_percentages_in_max_memory_are_of_each_device():
    budget = parse(max_memory="0=50%,cpu=25%", machine=ONE_GPU)
    assert budget.limits == {"cuda:0": 15 * GIB // 2, "cpu": 6 * GIB}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0=15GiB,1=15GiB,cpu=30GiB,disk=100GB"),
        ("0:15GB", "'0:15GB' is not DEVICE=SIZE"),
        ("0=15GB,", "'' is not DEVICE=SIZE"),
        ("gpu=1GB", "'gpu=1GB' is not"),
        ("-1=1GB", "'-1=1GB' is not"),
        ("cuda:0=1GB", "'cuda:0=1GB' is not"),
        ("0=1GB,0=2GB", "0 is there twice"),
        ("0=1GB,00=2GB", "00 is there twice"),
        ("cpu=1GB,CPU=2GB", "CPU is there twice"),
        ("0=0", "less than a byte"),
        ("cpu=0", "cannot have 0"),
        ("0=", "--max-memory 0=: '' is not a size"),
        ("0=1GB,cpu=lots", "--max-memory cpu=lots: 'lots' is not a size"),
        ("0=1GB,disk=50%", "nobody knows what is free"),
        ("0=15", "With a unit: 15GB"),
    ],
)
def test_a_bad_max_memory_is_refused_with_the_part_that_is_wrong(text, message):
    with pytest.raises(BadBudget) as caught:
        parse(max_memory=text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("0=1GB", "cpu"),
        ("0=1GB", "cuda:1"),
        ("cpu=1GB", "cuda"),
        ("cpu=1GB", "cuda:0"),
        ("0=1GB,1=1GB", "cuda:0"),
    ],
)
def test_max_memory_and_device_must_agree(text, device):
    with pytest.raises(BadBudget, match=f"--device is {device}"):
        parse(max_memory=text, device=device)


@pytest.mark.parametrize(("text", "device"), [("0=1GB", "cuda"), ("1=1GB", "cuda:1"), ("cpu=1GB", "cpu")])
def test_a_device_that_max_memory_names_too_is_accepted(text, device):
    assert parse(max_memory=text, device=device).limits


# Where weights may be offloaded


def test_reading_weights_from_the_checkpoints_own_shards_has_no_limit_unless_given():
    assert parse("1GB").offload_bytes("disk", model_bytes=15 * 10**9) == 15 * 10**9
    assert parse(max_memory="cpu=1GB,disk=2GB").offload_bytes("disk", 15 * 10**9) == 2 * 10**9
    assert parse(max_memory="cpu=1GB,disk=0").offload_bytes("disk", 15 * 10**9) == 0


def test_a_device_that_computes_is_no_place_to_offload_to():
    assert parse("1GB").offload_bytes("cpu", 15 * 10**9) == 0
    assert parse(max_memory="0=1GB,cpu=2GB").offload_bytes("cpu", 15 * 10**9) == 2 * 10**9
    assert MemoryBudget(("cuda:0",), {"cuda:0": 1}).offload_bytes("cpu", 15 * 10**9) == 0


# What CUDA takes for itself


def test_a_card_with_more_multiprocessors_has_a_larger_context():
    big = Machine(32 * GIB, 24 * GIB, (BIG, *TWO_GPUS.gpus[1:]))
    assert 765e6 < parse("16GB", machine=big).context_bytes < 800e6
    assert (
        parse(max_memory="0=16GB,1=6GB", machine=big).context_bytes
        == parse("16GB", machine=big).context_bytes
    )


def test_of_a_card_that_is_elsewhere_or_does_not_tell_a_usual_context_is_assumed():
    big = Machine(32 * GIB, 24 * GIB, (BIG,))
    for found in (parse(gpu="16GiB", machine=big), parse("6GB", machine=ONE_GPU), parse(gpu="16GiB")):
        assert found.context_bytes == CUDA_CONTEXT_BYTES
