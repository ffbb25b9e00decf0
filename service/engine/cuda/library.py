"""Compiles fused.cu for a GPU with NVRTC, which torch brings along, and launches what is in it.

NVRTC and the driver are called as their own documentation has it (docs.nvidia.com/cuda/nvrtc and
cuda-driver-api): no compiler has to be on the machine, and a launch takes a few microseconds of the host.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

SOURCE = Path(__file__).with_name("fused.cu")
WARP, VECTOR, MOST_VECTORS = 32, 8, 4  # as there
LOAD_BYTES = 16  # of a Vector
FEW_ROWS = (1, 2)
MOST_THREADS, THREADS = 1024, 256
MOST_WIDTH = MOST_THREADS * VECTOR * MOST_VECTORS
DTYPES = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
# CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE, CU_LAUNCH_PARAM_END
_POINTER, _SIZE, _END = 1, 2, 0
_MATRIX = "PPPq"  # struct Matrix of fused.cu


class CannotCompile(Exception):
    """NVRTC or the driver refuses; the message is theirs."""


def compiled(source: str, architecture: str, defines: dict[str, int]) -> bytes:
    """The machine code of `source` for a GPU, "sm_90" for one. Raises CannotCompile."""
    nvrtc = _nvrtc()
    program = ctypes.c_void_p()
    _check(
        nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"fused.cu", 0, None, None), "create"
    )
    try:
        words = [f"--gpu-architecture={architecture}", *(f"-D{k}={v}" for k, v in defines.items())]
        options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
        if nvrtc.nvrtcCompileProgram(program, len(words), options):
            log = _text(nvrtc, "ProgramLog", program).rstrip(b"\0")
            raise CannotCompile(log.decode(errors="replace"))
        return _text(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _text(nvrtc: Any, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
    found = ctypes.create_string_buffer(size.value)
    _check(getattr(nvrtc, f"nvrtcGet{what}")(program, found), what)
    return found.raw


@cache
def _nvrtc() -> Any:
    """Raises CannotCompile where it is not found."""
    major = (torch.version.cuda or "13").partition(".")[0]
    try:
        return ctypes.CDLL(f"libnvrtc.so.{major}")  # which torch has loaded already
    except OSError as error:
        raise CannotCompile(str(error)) from error


def _check(result: int, what: str) -> None:
    if result:
        raise CannotCompile(f"{what}: error {result}")


class LaunchFailed(Exception):
    """A kernel could not be started."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"CUDA error {code} when {name} was launched")


class Kernel:
    """One function of the module, with parameters of a fixed form."""

    def __init__(self, driver: Any, module: ctypes.c_void_p, name: str, form: str) -> None:
        """`form` are the parameters as `struct` has them, in C's own alignment."""
        self._launch, self._function = driver.cuLaunchKernel, ctypes.c_void_p()
        _check(driver.cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()), name)
        self._name, self._form = name, struct.Struct(f"@{form}")
        self._buffer = ctypes.create_string_buffer(self._form.size)
        self._buffer_size = ctypes.c_size_t(self._form.size)
        self._extra = (ctypes.c_void_p * 5)(
            _POINTER, ctypes.addressof(self._buffer), _SIZE, ctypes.addressof(self._buffer_size), _END
        )

    def __call__(self, stream: int, blocks: int, threads: int, *parameters: float) -> None:
        self._form.pack_into(self._buffer, 0, *parameters)  # the driver copies them
        result = self._launch(
            self._function, blocks, 1, 1, threads, 1, 1, 0, ctypes.c_void_p(stream), None, self._extra
        )
        if result:
            raise LaunchFailed(self._name, result)


class CudaKernels:
    """The kernels on one GPU, for tensors of one dtype that lie there contiguously.

    They go to the current stream, so that they are recorded into graphs as torch's own are. Raises
    CannotCompile.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device = device
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes a context where there is none
            major, minor = torch.cuda.get_device_capability()
            defines = {"HALF_IS_BF16": int(dtype == torch.bfloat16)}
            code = compiled(SOURCE.read_text(), f"sm_{major}{minor}", defines)
            driver = ctypes.CDLL("libcuda.so.1")
            self._driver, self._module = driver, module = driver, ctypes.c_void_p()
            _check(driver.cuModuleLoadData(ctypes.byref(module), code), "cuModuleLoadData")
            self._norm = Kernel(driver, module, "add_rms_norm", "PPPPif")
            self._rotate = Kernel(driver, module, "rotate_and_store", "PPPPPPPPPPiiiif")
            self._silu = Kernel(driver, module, "silu_times", "PPq")
            self._matrices, self._gated = (
                {rows: Kernel(driver, module, f"{name}_{rows}", f"P{_MATRIX * count}q") for rows in FEW_ROWS}
                for name, count in (("times_matrices", 3), ("times_gated", 2))
            )

    def here(self) -> AbstractContextManager[None]:
        """Launches go to the current GPU: within this it is that of the kernels."""
        return torch.cuda.device(self._device)

    def close(self) -> None:
        """Nothing may launch them any more, no graph either. Idempotent."""
        if self._module:
            with self.here():
                self._driver.cuModuleUnload(self._module)
            self._module = ctypes.c_void_p()

    def add_rms_norm(
        self, hidden: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """Adds `delta` to `hidden` [rows, width] in place; the RMSNorm of the sum."""
        rows, width = hidden.shape
        out = torch.empty_like(hidden)
        threads = min(MOST_THREADS, -(-width // (VECTOR * WARP)) * WARP)
        self._norm(
            self._stream(), rows, threads,
            hidden.data_ptr(), _address(delta), weight.data_ptr(), out.data_ptr(), width, eps,
        )  # fmt: skip
        return out

    def rotate_and_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        norms: tuple[torch.Tensor | None, torch.Tensor | None],
        eps: float,
        slots: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Rotates q [tokens, heads, head_dim] in place by cos and sin [tokens, head_dim], and k [tokens,
        kv_heads, head_dim] into its slots of the pool, where v goes as it is. With `norms`, q and k are
        normed before."""
        (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
        warps = tokens * (heads + 2 * kv_heads)
        self._rotate(
            self._stream(), -(-warps * WARP // THREADS), THREADS,
            q.data_ptr(), k.data_ptr(), v.data_ptr(), *(x.data_ptr() for x in tables), *map(_address, norms),
            slots.data_ptr(), *(x.data_ptr() for x in pools), tokens, heads, kv_heads, head_dim, eps,
        )  # fmt: skip

    def silu_times(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, in the memory of `gate`."""
        vectors = gate.numel() // VECTOR
        self._silu(self._stream(), -(-vectors // THREADS), THREADS, gate.data_ptr(), up.data_ptr(), vectors)
        return gate

    def times_matrices(self, x: torch.Tensor, linears: Sequence[nn.Linear]) -> list[torch.Tensor]:
        """What up to three Linears give for x [one of FEW_ROWS, k].

        torch's products of so few rows leave memory bandwidth unused, the more the smaller a matrix is;
        from four rows on they are as fast.
        """
        outs = [x.new_empty(len(x), linear.out_features) for linear in linears]
        matrices = [_matrix(linear, out) for linear, out in zip(linears, outs, strict=True)]
        matrices += [(0, 0, 0, 0)] * (3 - len(linears))
        warps = sum(linear.out_features for linear in linears)
        self._matrices[len(x)](
            self._stream(), -(-warps * WARP // THREADS), THREADS,
            x.data_ptr(), *chain.from_iterable(matrices), x.shape[1],
        )  # fmt: skip
        return outs

    def times_gated(self, x: torch.Tensor, gate: nn.Linear, up: nn.Linear) -> torch.Tensor:
        """silu(gate(x)) * up(x) for x [one of FEW_ROWS, k]."""
        out = x.new_empty(len(x), gate.out_features)
        self._gated[len(x)](
            self._stream(), -(-gate.out_features * WARP // THREADS), THREADS,
            x.data_ptr(), *_matrix(gate, out), *_matrix(up, out), x.shape[1],
        )  # fmt: skip
        return out

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self._device).cuda_stream)


def _matrix(linear: nn.Linear, out: torch.Tensor) -> tuple[int, int, int, int]:
    return linear.weight.data_ptr(), _address(linear.bias), out.data_ptr(), linear.out_features


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
