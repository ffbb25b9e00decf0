"""library.py: finding and loading the kernels, their threads, and calls with nothing to do."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from torch import nn

from service.engine.cpu import library
from service.engine.cpu.modules import Matrix, PackedEmbedding, PackedLinear, PackedMlp, PackedRmsNorm
from service.engine.cpu.scratch import Scratch

ROOT = Path(library.__file__).parents[3]
# For processes of their own: packed() is a Linear of a size that all threads take part in.
PRELUDE = """
import os, signal, sys, threading, time
import torch
from torch import nn
from service.engine.cpu import library
from service.engine.cpu.modules import Matrix, PackedLinear
from service.engine.cpu.scratch import Scratch

def packed():
    torch.manual_seed(1)
    linear = nn.Linear(64, 4096, dtype=torch.bfloat16).requires_grad_(False)
    return PackedLinear(library.kernels(), Matrix(library.kernels(), linear), Scratch())

torch.manual_seed(2)
x = torch.randn(40, 64, dtype=torch.bfloat16)
"""
OPENMP, OWN = "", "library.gomp_parallel = lambda: None\n"  # whose threads


@pytest.fixture
def fresh(monkeypatch):
    """Nothing loaded yet, and nothing afterwards."""
    monkeypatch.delenv(library.ISA_VARIABLE, raising=False)
    monkeypatch.setattr(library, "_highest", None)
    library.kernels.cache_clear()
    yield monkeypatch
    library.kernels.cache_clear()


@pytest.fixture
def elsewhere(fresh, tmp_path):
    """Where library.py looks for the library."""
    fresh.setattr(library, "__file__", str(tmp_path / "library.py"))
    return tmp_path


def run(script, **environment):
    """What a process prints that may start threads, fork or hang."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def linear(n=48, k=64):
    return nn.Linear(k, n, dtype=torch.bfloat16).requires_grad_(False)


def test_without_a_library_torch_computes(elsewhere, caplog):
    with caplog.at_level(logging.INFO):
        assert library.kernels() is None
    assert library.describe() == "CPU kernels: not built; torch computes"
    assert not caplog.records


def test_sources_and_other_files_are_not_taken_for_the_library(elsewhere):
    for name in ("_kernels.cpp", "_kernels.so.old", "_kernels.cpython-311-of-another-machine.so"):
        (elsewhere / name).write_bytes(b"")
    assert library.kernels() is None
    assert library.describe() == "CPU kernels: not built; torch computes"


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"no library" * 1000])
def test_a_broken_library_is_told_once_and_not_used(elsewhere, caplog, content):
    (elsewhere / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(content)
    assert library.kernels() is None
    assert library.kernels() is None
    assert library.describe() == "CPU kernels: not used; torch computes"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"the CPU kernels in _kernels{EXTENSION_SUFFIXES[0]} cannot be used: " in record.getMessage()


def test_a_library_without_its_end_is_not_used(kernels, elsewhere, caplog):
    """The loader would find no memory behind its last page: a signal, no error."""
    built = next(Path(library.__spec__.origin).parent.glob("_kernels*.so")).read_bytes()
    (elsewhere / f"_kernels{EXTENSION_SUFFIXES[0]}").write_bytes(built[: len(built) // 2])
    assert library.kernels() is None
    assert caplog.records[0].getMessage().endswith("cannot be used: its end is missing")


def test_a_library_with_other_functions_is_not_used(elsewhere, caplog):
    shutil.copy(torch._C.__file__, elsewhere / f"_kernels{EXTENSION_SUFFIXES[0]}")
    assert library.kernels() is None
    assert caplog.records[0].getMessage().endswith("cannot be used: it has no snug_init")


def test_a_library_with_other_structures_is_not_used(kernels, fresh, caplog):
    class Longer(library.Layer):
        _fields_ = (("more", ctypes.c_int64),)

    fresh.setattr(library, "Layer", Longer)
    assert library.kernels() is None
    assert caplog.records[0].getMessage().endswith("cannot be used: it was built from other sources")


def test_the_library_of_this_python_comes_first(kernels, elsewhere):
    built = next(Path(library.__spec__.origin).parent.glob("_kernels*.so"))
    shutil.copy(built, elsewhere / f"_kernels{EXTENSION_SUFFIXES[0]}")
    (elsewhere / f"_kernels{EXTENSION_SUFFIXES[-1]}").write_bytes(b"broken")
    assert library.kernels().isa == kernels.isa


def test_the_log_says_what_computes(kernels):
    threads = f"{kernels.threads} thread{'s' * (kernels.threads > 1)}"
    assert library.describe() == f"CPU kernels: {kernels.isa}, {threads}"


@pytest.mark.parametrize("value", ["off", " OFF "])
def test_the_kernels_can_be_switched_off(fresh, value):
    fresh.setenv(library.ISA_VARIABLE, value)
    assert library.kernels() is None


def test_the_instruction_set_can_be_lowered(kernels, fresh):
    fresh.setenv(library.ISA_VARIABLE, "scalar")
    assert library.kernels().isa == "scalar"


def test_what_the_settings_say_wins_over_the_environment(kernels, fresh):
    fresh.setenv(library.ISA_VARIABLE, "off")
    library.restrict("auto")
    assert library.kernels().isa == kernels.isa
    library.restrict("scalar")
    assert library.kernels().isa == "scalar"
    library.restrict("off")
    assert library.kernels() is None
    with pytest.raises(ValueError, match="mmx"):
        library.restrict("mmx")


def test_an_instruction_set_that_does_not_exist_is_an_error(fresh):
    fresh.setenv(library.ISA_VARIABLE, "mmx")
    with pytest.raises(ValueError, match="SNUGFIT_CPU_ISA is 'mmx'; it may be auto, off, scalar, neon, avx2"):
        library.kernels()


def test_no_instruction_set_of_another_architecture_is_used(isa):
    of_arm = os.uname().machine in ("aarch64", "arm64")
    assert isa in (("scalar", "neon") if of_arm else tuple(x for x in library.ISAS if x != "neon"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_threads_are_those_of_torchs_own_openmp(kernels):
    """With two pools of threads one of them spins while the other computes."""
    printed = run("""
packed()(x)
maps = [line.split() for line in open("/proc/self/maps") if "omp" in line]
at = library.gomp_parallel() or 0
found = {m[-1] for m in maps if int(m[0].split("-")[0], 16) <= at < int(m[0].split("-")[1], 16)}
print(*found, *{m[-1] for m in maps} - found, sep=", ")
""")
    if not printed:
        pytest.skip("this torch has threads of another kind")
    (only,) = printed.split(", ")
    assert Path(only).name.startswith("lib")


def test_there_are_as_many_threads_as_torch_has(kernels):
    script = "torch.set_num_threads({}); print(library.describe().split(', ')[1])"
    assert run(script.format(1)) == "1 thread"
    assert run(script.format(3)) == "3 threads"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_without_openmp_threads_of_its_own_compute_the_same_and_sleep_in_between(kernels):
    assert run("""
def states():
    texts = {t: open(f"/proc/self/task/{t}/stat").read() for t in os.listdir("/proc/self/task")}
    return {t: text.rsplit(")")[-1].split()[0] for t, text in texts.items()}

torch.set_num_threads(3)
expected = packed()(x)
library.kernels.cache_clear()
library.gomp_parallel = lambda: None
before = states()
library.kernels()
own = states().keys() - before.keys()
assert len(own) == 2, own
module = packed()
assert all(torch.equal(module(x), expected) for _ in range(300))
for _ in range(1000):
    if all(states()[t] == "S" for t in own):
        raise SystemExit(print("they sleep"))
    time.sleep(0.02)
""") == "they sleep"  # fmt: skip


@pytest.mark.parametrize("threads", [OPENMP, OWN], ids=["openmp", "own"])
def test_callers_at_the_same_time_do_not_disturb_each_other(kernels, threads):
    assert run(threads + """
torch.set_num_threads(4)
expected = packed()(x)
modules, right = [packed() for _ in range(3)], []

def call(module):
    right.append(all(bool((module(x) == expected).all()) for _ in range(1500)))

callers = [threading.Thread(target=call, args=(module,)) for module in modules]
for caller in callers: caller.start()
for caller in callers: caller.join()
print(right)
""") == "[True, True, True]"  # fmt: skip


@pytest.mark.parametrize("threads", [OPENMP, OWN], ids=["openmp", "own"])
def test_a_child_made_by_fork_computes_the_same(kernels, threads):
    """Its parent's threads are not there; whoever waits for them waits for ever."""
    assert run(threads + """
torch.set_num_threads(2)
module = packed()
expected = bytes(module(x).view(torch.int8).numpy())
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if bytes(module(x).view(torch.int8).numpy()) == expected else 1)
print(os.waitpid(child, 0)[1], bytes(module(x).view(torch.int8).numpy()) == expected)
""") == "0 True"  # fmt: skip


def test_calls_with_no_rows_do_nothing(isa, kernels):
    """An expert that no token chose, a step whose logits nobody wants."""
    scratch, nothing = Scratch(), torch.empty(1, 0, 64, dtype=torch.bfloat16)
    down = Matrix(kernels, linear(n=64, k=96))
    gate, up = (Matrix(kernels, linear(n=96)) for _ in range(2))
    head = Matrix(kernels, linear())
    norm = nn.RMSNorm(64, dtype=torch.bfloat16)
    norm.variance_epsilon = 1e-6
    assert PackedLinear(kernels, head, scratch)(nothing).shape == (1, 0, 48)
    assert PackedMlp(kernels, gate, up, down, 0, scratch)(nothing).shape == (1, 0, 64)
    assert PackedRmsNorm(kernels, norm)(nothing).shape == (1, 0, 64)
    assert PackedEmbedding(kernels, head, None)(torch.empty(1, 0, dtype=torch.long)).shape == (1, 0, 64)
    assert scratch.n_bytes == 0


def test_calls_with_no_rows_write_nothing(isa, kernels):
    kept = torch.full((64,), 7.0, dtype=torch.bfloat16)
    matrix = Matrix(kernels, linear(n=64))
    at = kept.data_ptr()
    kernels.linear(at, 64, 0, matrix.pointer, at, 64, at)
    kernels.gated(at, 64, 0, matrix.pointer, matrix.pointer, matrix.pointer, 0, at, 64, at)
    kernels.rms_norm(at, at, 1e-6, 0, 64, at)
    kernels.rows(matrix.c.packed, 64, 64, at, 0, at)
    assert (kept == 7).all()


def test_a_thread_that_did_not_load_the_library_may_call_it(isa, kernels):
    """The tiles are lent to the process, not to the thread that asked for them."""
    packed = PackedLinear(kernels, Matrix(kernels, linear(n=512)), Scratch())
    x = torch.randn(20, 64, dtype=torch.bfloat16)
    expected, got = packed(x), []
    thread = threading.Thread(target=lambda: got.append(packed(x)))
    thread.start()
    thread.join()
    assert torch.equal(got[0], expected)
