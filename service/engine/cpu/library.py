"""The compiled kernels, when they were built with the package and this machine can run them."""

from __future__ import annotations

import ctypes
import logging
import os
import struct
from ctypes import POINTER, Structure, c_float, c_int, c_int64, c_void_p
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

# The instruction sets of common.h, in rising order. Where restrict() was not called (tests), SNUGFIT_CPU_ISA
# names the highest that may be used.
ISAS = ("scalar", "neon", "avx2", "avx512", "avx512_bf16", "amx")
ISA_VARIABLE = "SNUGFIT_CPU_ISA"
OFF, AUTO = "off", "auto"
_highest: str | None = None  # what restrict() was told


class Weight(Structure):
    """A packed matrix (linear.h)."""

    _fields_ = (("packed", c_void_p), ("bias", c_void_p), ("n", c_int64), ("k", c_int64))


class Layer(Structure):
    """A decoder layer of the Llama kind (linear.h)."""

    _fields_ = (
        *((name, Weight) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("norm1", "norm2", "q_norm", "k_norm", "k_pool", "v_pool")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", c_float),
        ("scale", c_float),
        ("window", c_int64),
    )


class Step(Structure):
    """What one forward puts through every layer (linear.h)."""

    _fields_ = (
        ("tokens", c_int64),
        *((name, c_void_p) for name in ("cos", "sin", "slots", "tables")),
        ("table_stride", c_int64),
        ("cu_seqlens", c_void_p),
        ("starts", c_void_p),
        ("sequences", c_int64),
        ("scratch", c_void_p),
    )


_INT, _PTR, _FLOAT = c_int64, c_void_p, c_float
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "snug_init": (c_int, c_int, _PTR),
    "snug_fits": (_INT, _INT),
    "snug_pack": (_PTR, _INT, _INT),
    "snug_rows": (_PTR, _INT, _INT, _PTR, _INT, _PTR),
    "snug_linear_scratch": (_INT, _INT),
    "snug_gated_scratch": (_INT, _INT, _INT),
    "snug_layer_scratch": (_INT, _INT, _INT, _INT, _INT),
    "snug_linear": (_PTR, _INT, _INT, POINTER(Weight), _PTR, _INT, _PTR),
    "snug_gated": (
        _PTR, _INT, _INT, POINTER(Weight), POINTER(Weight), POINTER(Weight), c_int, _PTR, _INT, _PTR,
    ),
    "snug_rms_norm": (_PTR, _PTR, _FLOAT, _INT, _INT, _PTR),
    "snug_layers": (POINTER(Layer), POINTER(_INT), _INT, POINTER(Step), _PTR),
    "snug_store_kv": (_PTR, _INT, _INT, _PTR, _INT, _INT, _PTR, _INT, _INT, _INT, _PTR, _PTR),
    "snug_attention": (
        _PTR, _INT, _INT, _PTR, _PTR, _PTR, _INT, _PTR, _PTR, _INT, _INT, _INT, _INT, _FLOAT, _INT, _FLOAT,
        _PTR, _INT,
    ),
}  # fmt: skip
_RESULTS = {name: c_int64 for name in _SIGNATURES if name.endswith("_scratch")} | {
    "snug_init": c_int,
    "snug_fits": c_int,
}


class Kernels:
    """The library's functions as attributes (snug_linear is `linear`), and the instruction set they use.

    Raises OSError when the library cannot be loaded or was built from other sources. Any thread may call the
    functions. A child made by fork computes on one thread.
    """

    def __init__(self, path: Path, wanted: int, threads: int) -> None:
        if _cut_short(path):
            raise OSError("its end is missing")
        library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise OSError(f"it has no {name}")
            function.argtypes, function.restype = arguments, _RESULTS.get(name)
            setattr(self, name.removeprefix("snug_"), function)
        if not self.fits(ctypes.sizeof(Layer), ctypes.sizeof(Step)):
            raise OSError("it was built from other sources")
        self.isa: str = ISAS[self.init(wanted, threads, gomp_parallel())]
        self.threads = threads

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the kernels have no function {name!r}")


def restrict(isa: str) -> None:
    """Use no instruction set above `isa`, one of ISAS; auto: the best there is; off: no kernels.

    To be called before a model is loaded: what is packed stays packed. Raises ValueError for another name.
    """
    global _highest
    _highest = _known(isa)
    kernels.cache_clear()


def _known(isa: str) -> str:
    if isa not in (AUTO, OFF, *ISAS):
        raise ValueError(f"{ISA_VARIABLE} is {isa!r}; it may be {AUTO}, {OFF}, {', '.join(ISAS)}")
    return isa


@cache
def kernels() -> Kernels | None:
    """The kernels, on as many threads as torch has now.

    None where they were not built or cannot be loaded, which is logged, or were switched off.
    """
    wanted = _highest or _known(os.environ.get(ISA_VARIABLE, "").strip().lower() or AUTO)
    path = _built()
    if wanted == OFF or path is None:
        return None
    try:
        return Kernels(path, ISAS.index(wanted) if wanted != AUTO else -1, torch.get_num_threads())
    except OSError as error:
        log.warning("the CPU kernels in %s cannot be used: %s", path.name, error)
        return None


def describe() -> str:
    """One line for the log: what computes bf16 on the CPU."""
    found = kernels()
    if found is not None:
        return f"CPU kernels: {found.isa}, {found.threads} thread{'s' if found.threads > 1 else ''}"
    return f"CPU kernels: {'not used' if _built() else 'not built'}; torch computes"


def gomp_parallel() -> int | None:
    """GOMP_parallel of the OpenMP that torch computes on: with one pool of threads none waits for a core.

    Asked of libtorch_cpu, which looks into what it was linked with, so it is torch's own whatever its file is
    called and whatever else is loaded. None where torch has threads of another kind.
    """
    path = next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"), None)
    try:
        loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD)
        return ctypes.cast(loaded.GOMP_parallel, c_void_p).value
    except (OSError, AttributeError):
        return None


def _built() -> Path | None:
    """The library beside this file, of this Python; the build names it as extension modules are named."""
    names = (Path(__file__).with_name(f"_kernels{suffix}") for suffix in EXTENSION_SUFFIXES)
    return next((path for path in names if path.is_file()), None)


def _cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its table of sections, its last part. Loading it would be a SIGBUS."""
    with path.open("rb") as file:
        head = file.read(64)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    (sections,) = struct.unpack_from("<Q", head, 40)
    size, count = struct.unpack_from("<HH", head, 58)
    return path.stat().st_size < sections + size * count


__all__ = ["Kernels", "Layer", "Step", "Weight", "describe", "kernels", "restrict"]
