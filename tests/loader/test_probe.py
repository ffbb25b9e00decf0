"""loader/probe.py: GPUs through the real pynvml and a library built here, RAM within control groups."""

import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import loader
from loader import probe
from loader.probe import Gpu, Machine

GIB = 2**30
FAKE_NVML = Path(__file__).parents[1] / "e2e" / "fake_nvml.c"
FIRST = ["Fake 8 GiB", "GPU-aaaaaaaa-0000-0000-0000-000000000000", 8 * GIB, 7 * GIB, 34]
SECOND = ["Fake 16 GiB", "GPU-bbbbbbbb-1111-1111-1111-111111111111", 16 * GIB, 15 * GIB, None]
# Prints, for each CUDA_VISIBLE_DEVICES in a JSON list, the GPUs that machine() finds.
SHOW = """
import json, os, sys
from loader import probe
def gpus(visible):
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    return [
        [g.device, g.name, g.uuid, g.total_bytes, g.free_bytes, g.multiprocessors]
        for g in probe.machine().gpus
    ]
print(json.dumps([gpus(visible) for visible in json.loads(sys.argv[1])]))
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc, and a library faked for Linux's loader")


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The folder of a fake libnvidia-ml.so.1 with two GPUs."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not compiler:
        pytest.skip("no C compiler: the NVML code is NOT tested; install gcc")
    folder = tmp_path_factory.mktemp("nvml")
    target = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, FAKE_NVML], check=True)
    return str(folder)


def show(visible, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA_", "FAKE_NVML"))}
    ran = subprocess.run(
        [sys.executable, "-c", SHOW, json.dumps(visible)],
        env={**clean, "PYTHONPATH": str(Path(loader.__file__).parents[1]), **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(ran.stdout)


# GPUs


@linux
def test_gpus_are_numbered_as_cuda_visible_devices_says(library):
    cases = {
        None: [FIRST, SECOND],
        "0,1": [FIRST, SECOND],
        "1,0": [SECOND, FIRST],
        "1": [SECOND],
        " 1 , 0 ": [SECOND, FIRST],
        "GPU-bbbbbbbb-1111-1111-1111-111111111111": [SECOND],
        "GPU-bb,GPU-aa": [SECOND, FIRST],
        "": [],
        "-1": [],
        "0,-1,1": [FIRST],
        "0,7,1": [FIRST],
        "GPU-": [],  # it could be either
        "GPU-cc": [],
        "NoDevFiles": [],
    }
    found = show(list(cases), LD_LIBRARY_PATH=library)
    for visible, gpus in zip(cases, found, strict=True):
        expected = [[f"cuda:{number}", *gpu] for number, gpu in enumerate(cases[visible])]
        assert gpus == expected, visible


@linux
def test_a_driver_that_is_not_loaded_or_loses_a_gpu_means_no_gpus(library):
    assert show([None], LD_LIBRARY_PATH=library, FAKE_NVML_INIT="9") == [[]]
    assert show([None], LD_LIBRARY_PATH=library, FAKE_NVML_USED="/nowhere") == [[]]


def test_free_bytes_are_asked_for_by_device():
    machine = Machine(32, 24, (Gpu("cuda:0", "A", "GPU-a", 16, 15), Gpu("cuda:1", "B", "GPU-b", 8, 7)))
    found = [machine.free_bytes(device) for device in ("cpu", "cuda:0", "cuda:1", "cuda:2", "disk")]
    assert found == [24, 15, 7, None, None]


# RAM


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Sets this process's control groups: the lines of /proc/self/cgroup, and files under /sys/fs/cgroup."""

    def set_groups(lines, files):
        (tmp_path / "proc").write_text(lines)
        for name, content in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{content}\n")
        monkeypatch.setattr(probe, "PROC_CGROUP", tmp_path / "proc")
        monkeypatch.setattr(probe, "CGROUP_ROOT", tmp_path / "cgroup")
        machine = probe.machine()
        return machine.ram_total_bytes, machine.ram_free_bytes

    return set_groups


def v2(folder, limit, current, cache=0, **more):
    files = {"memory.max": limit, "memory.current": current, "memory.stat": f"anon 1\ninactive_file {cache}"}
    return {f"{folder}{name}": value for name, value in {**files, **more}.items()}


def v1(folder, limit, usage, cache=0):
    return {
        f"memory/{folder}memory.limit_in_bytes": limit,
        f"memory/{folder}memory.usage_in_bytes": usage,
        f"memory/{folder}memory.stat": f"inactive_file 0\ntotal_inactive_file {cache}",
    }


def test_threads_are_the_cores_that_this_process_may_use(groups, monkeypatch):
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _pid: set(range(6)), raising=False)
    monkeypatch.setattr(probe.psutil, "cpu_count", lambda logical: 16 if logical else 8)
    groups("0::/\n", {})
    assert probe.cpu_threads() == 6
    monkeypatch.setattr(probe.psutil, "cpu_count", lambda logical: 6 if logical else 3)
    assert probe.cpu_threads() == 3


@pytest.mark.parametrize(
    ("lines", "files", "threads"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "max 100000"}, 8),
        ("0::/pod/one\n", {"pod/cpu.max": "300000 100000", "pod/one/cpu.max": "max 100000"}, 3),
        ("0::/\n", {"cpu.max": "20000 100000"}, 1),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu,cpuacct:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("0::/\n", {}, 8),
    ],
)  # fmt: skip
def test_a_containers_quota_limits_the_threads(groups, monkeypatch, lines, files, threads):
    monkeypatch.setattr(probe.os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(probe.psutil, "cpu_count", lambda logical: 8)
    groups(lines, files)
    assert probe.cpu_threads() == threads


def unlimited():
    memory = psutil.virtual_memory()
    return memory.total, pytest.approx(memory.available, rel=0.1)


def test_a_containers_limit_is_the_machine_and_cached_files_count_as_free(groups):
    limited = groups("0::/\n", v2("", 10**9, 6 * 10**8, cache=10**8))
    assert limited == (10**9, 5 * 10**8)


def test_without_a_limit_all_ram_counts(groups):
    assert groups("0::/\n", v2("", "max", 6 * 10**8)) == unlimited()
    assert groups("0::/no/such/group\n", {}) == unlimited()


def test_no_control_groups_at_all_is_no_limit(groups, monkeypatch, tmp_path):
    groups("", {})
    monkeypatch.setattr(probe, "PROC_CGROUP", tmp_path / "nowhere")
    assert probe.machine().ram_total_bytes == psutil.virtual_memory().total


def test_the_tightest_group_around_the_process_counts(groups):
    files = {**v2("a/b/", 3 * 10**8, 10**8), **v2("a/", 2 * 10**8, 5 * 10**7), **v2("", 10**9, 10**8)}
    assert groups("0::/a/b\n", files) == (2 * 10**8, 15 * 10**7)


def test_a_limit_that_throttles_counts_too(groups):
    files = v2("", "max", 10**8, **{"memory.high": 4 * 10**8})
    assert groups("0::/\n", files) == (4 * 10**8, 3 * 10**8)


def test_a_group_over_its_limit_has_nothing_free(groups):
    assert groups("0::/\n", v2("", 10**8, 2 * 10**8)) == (10**8, 0)


def test_a_path_outside_of_the_containers_view_is_looked_for_inside(groups):
    assert groups("0::/../../system.slice/x\n", v2("", 10**9, 10**8)) == (10**9, 9 * 10**8)


def test_version_1_is_read_by_its_own_names(groups):
    lines = "5:devices:/\n4:memory:/docker/abc\n0::/\n"
    limited = groups(lines, v1("", 10**9, 7 * 10**8, cache=2 * 10**8))
    assert limited == (10**9, 5 * 10**8)


def test_version_1_without_a_limit_has_a_huge_number_there(groups):
    assert groups("4:memory:/\n", v1("", 9223372036854771712, 10**8)) == unlimited()


def test_a_hybrid_of_both_versions_is_read(groups):
    files = v2("unified/", 10**9, 10**8)
    assert groups("1:name=systemd:/\n0::/\n", files) == (10**9, 9 * 10**8)


# This process

TOUCHED = 64 * 2**20


def test_the_peak_stays_when_memory_is_given_back():
    before = probe.resident_bytes()
    block = bytearray(os.urandom(4096) * (TOUCHED // 4096))
    during = probe.resident_bytes()
    assert during - before > 0.9 * TOUCHED
    assert probe.peak_resident_bytes() >= 0.99 * during
    del block
    assert probe.resident_bytes() < during - 0.9 * TOUCHED
    assert probe.peak_resident_bytes() >= 0.99 * during


@linux
def test_a_reset_starts_the_peak_at_what_is_resident_now():
    block = bytearray(os.urandom(4096) * (TOUCHED // 4096))
    high = probe.peak_resident_bytes()
    del block
    assert probe.reset_peak()
    assert probe.peak_resident_bytes() < high - 0.9 * TOUCHED


@linux
def test_pages_of_mapped_files_count_as_resident(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(TOUCHED))
    with (tmp_path / "weights").open("rb") as file:
        before = probe.resident_bytes()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert not any(mapped[::4096])
            assert probe.resident_bytes() - before > 0.9 * TOUCHED


def test_where_the_system_cannot_reset_the_peak_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(probe, "PROC_CLEAR_REFS", tmp_path / "nowhere" / "clear_refs")
    monkeypatch.setattr(probe, "PROC_STATUS", tmp_path / "nowhere" / "status")
    assert not probe.reset_peak()
    assert probe.peak_resident_bytes() >= 0.9 * probe.resident_bytes()
