"""How kernels are compiled and launched; what they compute is tested on a GPU (tests/gpu/test_fused.py)."""

import ctypes
import re
import struct

import pytest
import torch
from torch import nn

from service.engine.cuda import library
from service.engine.cuda.library import SOURCE, CannotCompile, CudaKernels, Kernel, LaunchFailed, compiled


class Driver:
    """Stands for libcuda; keeps what was launched."""

    def __init__(self, launched=0):
        self.result, self.seen = launched, []

    def cuModuleGetFunction(self, function, module, name):
        return 0

    def cuLaunchKernel(self, function, *rest):
        grid, shared, stream, parameters, extra = rest[:6], rest[6], rest[7], rest[8], rest[9]
        assert (shared, parameters) == (0, None)
        assert (extra[0], extra[2], extra[4]) == (1, 2, None)  # CU_LAUNCH_PARAM_END is a null pointer
        size = ctypes.cast(extra[3], ctypes.POINTER(ctypes.c_size_t)).contents.value
        self.seen.append((grid, stream.value, ctypes.string_at(extra[1], size)))
        return self.result


def test_parameters_lie_as_c_lays_them_out():
    class Parameters(ctypes.Structure):
        _fields_ = [
            ("a", ctypes.c_void_p),
            ("n", ctypes.c_int),
            ("eps", ctypes.c_float),
            ("b", ctypes.c_longlong),
        ]

    driver = Driver()
    Kernel(driver, ctypes.c_void_p(), "some", "Pifq")(7, 3, 96, 0x1234, 5, 0.5, -9)
    ((grid, stream, passed),) = driver.seen
    assert (grid, stream) == ((3, 1, 1, 96, 1, 1), 7)
    found = Parameters.from_buffer_copy(passed)
    assert (found.a, found.n, found.eps, found.b) == (0x1234, 5, 0.5, -9)


def test_a_launch_that_fails_says_which_and_why():
    kernel = Kernel(Driver(launched=700), ctypes.c_void_p(), "add_rms_norm", "P")
    with pytest.raises(LaunchFailed, match="CUDA error 700 when add_rms_norm was launched"):
        kernel(0, 1, 32, 0)


@pytest.fixture
def kernels(monkeypatch):
    """The kernels over a driver that only listens, and the driver."""
    driver = Driver()
    driver.cuModuleLoadData = lambda module, code: 0
    monkeypatch.setattr(library, "compiled", lambda source, architecture, defines: b"")
    monkeypatch.setattr(library.ctypes, "CDLL", lambda name: driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: _Nothing())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: _Nothing())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return CudaKernels(torch.device("cpu"), torch.bfloat16), driver


class _Nothing:
    cuda_stream = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_every_kernel_gets_as_many_parameters_as_its_source_has(kernels):
    over, driver = kernels
    x, wide = torch.zeros(2, 64), torch.zeros(2, 4, 64)
    linears = [nn.Linear(64, 40) for _ in range(3)]
    over.add_rms_norm(x, None, x[0], 1e-6)
    over.rotate_and_store(wide, wide, wide, (x, x), (None, None), 1e-6, x, (x, x))
    over.silu_times(x, x)
    over.times_matrices(x, linears)
    over.times_gated(x, *linears[:2])
    sizes = [len(passed) for _, _, passed in driver.seen]
    names = ("add_rms_norm", "rotate_and_store", "silu_times", "times_matrices_##ROWS", "times_gated_##ROWS")
    assert sizes == [_parameter_bytes(name) for name in names]


def _parameter_bytes(name):
    """What the parameters of a kernel take, aligned as in C, by its declaration in the source."""
    source = SOURCE.read_text().replace("\\\n", "\n")
    (declared,) = re.findall(rf"__global__ void {re.escape(name)}\(([^)]*)\)", source)
    form = "".join(_form(parameter) for parameter in declared.split(","))
    return struct.calcsize(f"@{form}")


def _form(parameter):
    if "*" in parameter:
        return "P"
    return {"Matrix": "PPPq", "int": "i", "float": "f", "long": "q"}[parameter.split()[0]]


def test_a_warp_is_started_for_everything_that_has_one(kernels):
    over, driver = kernels
    x = torch.zeros(1, 64)
    over.times_matrices(x, [nn.Linear(64, 100), nn.Linear(64, 3)])
    over.rotate_and_store(torch.zeros(5, 3, 64), x.view(1, 1, 64), x, (x, x), (None, None), 1e-6, x, (x, x))
    (matrices, _, _), (rotate, _, _) = driver.seen
    assert matrices[0] * matrices[3] // 32 >= 103
    assert rotate[0] * rotate[3] // 32 >= 5 * (3 + 2)


def test_without_nvrtc_the_reason_is_the_systems(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    library._nvrtc.cache_clear()
    try:
        with pytest.raises(CannotCompile, match=r"libnvrtc\.so\.99"):
            compiled("", "sm_90", {})
    finally:
        library._nvrtc.cache_clear()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_source_compiles_wherever_nvrtc_is(architecture):
    try:
        library._nvrtc()
    except CannotCompile:
        pytest.skip("there is no NVRTC: torch here is built for the CPU")
    for bf16 in (0, 1):
        assert compiled(SOURCE.read_text(), architecture, {"HALF_IS_BF16": bf16})[:4] == b"\x7fELF"
    with pytest.raises(CannotCompile, match="error"):
        compiled("no source", architecture, {})
