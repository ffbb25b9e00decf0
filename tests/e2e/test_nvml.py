"""GPU metrics through the real pynvml and a real shared library, built here: no Python is patched."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

FIRST = ("cuda:0", "GPU-aaaaaaaa-0000-0000-0000-000000000000")
SECOND = ("cuda:1", "GPU-bbbbbbbb-1111-1111-1111-111111111111")
GIB = 2**30

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the driver's library is faked for Linux's loader"
)


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The folder of a fake libnvidia-ml.so.1."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler: the NVML code is NOT tested; install gcc")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    target = folder / "libnvidia-ml.so.1"
    command = [compiler, "-shared", "-fPIC", "-O2", "-Wl,-soname,libnvidia-ml.so.1", "-o", target, source]
    subprocess.run(command, check=True)
    return str(folder)


def values(program, name):
    """(device, uuid) to value of one metric."""
    families = parse(program.get("/metrics").text)
    return {
        (sample.labels.get("device"), sample.labels.get("uuid")): sample.value
        for family in families
        for sample in family.samples
        if sample.name == name
    }


def up(program):
    return values(program, "snugfit_nvml_up")[None, None]


def test_memory_of_every_gpu_is_read_at_each_scrape(program, library, tmp_path):
    used = tmp_path / "used"
    used.write_text("123456789")
    with program(LD_LIBRARY_PATH=library, FAKE_NVML_USED=str(used)) as running:
        assert up(running) == 1
        assert values(running, "snugfit_vram_total_bytes") == {FIRST: 8 * GIB, SECOND: 16 * GIB}
        assert values(running, "snugfit_vram_used_bytes") == {FIRST: GIB, SECOND: 123456789}
        used.write_text("5")
        assert values(running, "snugfit_vram_used_bytes")[SECOND] == 5


@pytest.mark.parametrize(
    ("visible", "seen"),
    [
        ("1", [("cuda:0", SECOND[1])]),
        ("1,0", [("cuda:0", SECOND[1]), ("cuda:1", FIRST[1])]),
        ("GPU-bbbb", [("cuda:0", SECOND[1])]),
        ("1,7,0", [("cuda:0", SECOND[1])]),
        ("-1", []),
        ("", []),
    ],
)
def test_devices_are_named_as_cuda_visible_devices_names_them(program, library, visible, seen):
    with program(LD_LIBRARY_PATH=library, CUDA_VISIBLE_DEVICES=visible) as running:
        assert list(values(running, "snugfit_vram_used_bytes")) == seen
        assert up(running) == 1


@pytest.mark.parametrize(
    ("who", "shown", "said"),
    [
        ("self", {FIRST: 0, SECOND: 512 * 2**20}, None),
        ("hidden", {FIRST: 0}, "not available"),
        ("other", {FIRST: 0}, "other process ids"),
        ("forbidden", {}, "Insufficient Permissions"),
    ],
)
def test_the_processs_own_share_is_shown_where_the_driver_tells_it_and_said_once_where_not(
    program, library, who, shown, said
):
    with program(LD_LIBRARY_PATH=library, FAKE_NVML_PROC=who) as running:
        assert values(running, "snugfit_vram_process_bytes") == shown
        running.get("/metrics")
        assert running.log().count("cuda:1: the driver does not tell") == (1 if said else 0)
        assert running.log().count(said or "driver does not tell") == (
            2 if who == "forbidden" else bool(said)
        )


def test_a_driver_that_stops_answering_takes_the_series_away_and_comes_back(program, library, tmp_path):
    used = tmp_path / "used"
    used.write_text("1")
    with program(LD_LIBRARY_PATH=library, FAKE_NVML_USED=str(used)) as running:
        used.unlink()
        assert values(running, "snugfit_vram_used_bytes") == {}
        assert up(running) == 0
        assert "GPU is lost" in running.log()
        used.write_text("2")
        assert values(running, "snugfit_vram_used_bytes")[SECOND] == 2
        assert up(running) == 1


@pytest.mark.parametrize("environment", [{"FAKE_NVML_INIT": "9"}, None])
def test_without_nvml_the_service_runs_and_says_so_once(program, library, environment):
    """A library without a driver, and no library at all (where this machine has no driver either)."""
    settings = {"LD_LIBRARY_PATH": library, **environment} if environment else {}
    with program(**settings) as running:
        if environment is None and up(running) == 1:
            pytest.skip("this machine has an NVIDIA driver")
        assert up(running) == 0
        assert values(running, "snugfit_vram_used_bytes") == {}
        running.get("/metrics")
        assert running.log().count("no NVML") == 1
