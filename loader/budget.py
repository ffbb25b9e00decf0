"""MemoryBudget, and the only place where a size is text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from loader.errors import BadBudget, DeviceUnavailable

if TYPE_CHECKING:
    from loader.probe import Machine

FORMS = "16GB, 1.5GiB, 500000000 (bytes) or 90% (of what is free)"
MAX_MEMORY_FORM = "0=15GiB,1=15GiB,cpu=30GiB,disk=100GB"
# 256 MiB or 2 % of a card, whichever is more, stays with the desktop and the driver.
CARD_MARGIN_BYTES, CARD_MARGIN_PERCENT = 256 * 2**20, 2
# What CUDA takes of a card for itself: context, kernels, cuBLAS and its workspace. The context holds local
# memory for every thread that can run, so it grows with the multiprocessors. One H100 (132 of them, driver
# 580, CUDA 13.0) took 765 MB; elsewhere on the line it is an estimate.
CUDA_BASE_BYTES, CUDA_MULTIPROCESSOR_BYTES = 360_000_000, 3_250_000
# Of a card that cannot be asked: some 30 multiprocessors, as cards of 8 to 16 GB have.
CUDA_CONTEXT_BYTES = 450_000_000
# A process that takes all RAM is killed, and the system swaps long before that.
RAM_SHARE_PERCENT = 70
# Resident memory of the process before it loads a model: Python, torch for CPU and the model's class.
STARTUP_BYTES = 420 * 2**20
# Offloaded weights leave this much RAM to everything else.
RAM_MARGIN_BYTES, RAM_MARGIN_PERCENT = 2 * 10**9, 10
# A number this small without a unit was not meant as bytes: `--budget 16`.
SMALLEST_BARE_BYTES = 100_000

_DECIMAL = ("B", "KB", "MB", "GB", "TB")
_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_NUMBER = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([a-z%]*)", re.IGNORECASE | re.ASCII)
_BITS = re.compile(r"[KMGT]i?b")
_DEVICE = re.compile(r"\d+|cpu|disk", re.ASCII)
_DEVICE_FLAG = re.compile(r"auto|cpu|cuda(:\d+)?", re.ASCII)


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes that snugfit may use, device by device.

    `compute` are the devices that run the model, in pipeline order: ("cuda:0",), ("cuda:0", "cuda:1") or
    ("cpu",). `limits` maps each of them, and where weights may be offloaded ("cpu", "disk"), to bytes. On a
    GPU the limit covers the CUDA context too; on "cpu" as a compute device it is the resident memory that the
    model adds.

    A place that `limits` does not name: "cpu" is not used; "disk" has no limit, as in accelerate, because
    nothing is written there: offloaded weights are read straight from the checkpoint's shards. 0 turns a
    place off. Ask `offload_bytes` rather than `limits` how much may go to such a place.
    """

    compute: tuple[str, ...]
    limits: dict[str, int]
    origin: str = ""  # where the compute devices' limits came from, for a person: "--budget 16GB"
    default: bool = False  # nothing was asked for: the limit is what is free now
    context_bytes: int = CUDA_CONTEXT_BYTES  # of each GPU's limit: what CUDA takes for itself

    def offload_bytes(self, place: str, model_bytes: int) -> int:
        """How much of a model of `model_bytes` may go to "cpu" or "disk"; 0 for a compute device."""
        if place in self.compute:
            return 0
        return self.limits.get(place, model_bytes if place == "disk" else 0)

    @classmethod
    def parse(
        cls, budget: str | None, max_memory: str | None, device: str, machine: Machine, gpu: str | None = None
    ) -> MemoryBudget:
        """The budget that `--budget`, `--max-memory`, `--device` and `--gpu` describe on this machine.

        `budget` is the limit of the device that computes. `max_memory` is accelerate's form,
        "0=15GiB,cpu=30GiB,disk=100GB"; without a GPU's number in it, the CPU computes. `device` is "auto",
        "cpu", "cuda" (the first GPU) or "cuda:N"; "auto" is a GPU if the machine has one or `gpu` or a GPU's
        number is given. `gpu` is the size of a card, perhaps in another machine: the limit of cuda:0 is that
        less a margin of 256 MiB or 2 %, whichever is more.

        Defaults: on a GPU what is free less the same margin, so that `--gpu 16GiB` plans what an idle card of
        16 GiB will be given; on the CPU 70 % of available RAM. Beside a GPU, weights may be offloaded to
        available RAM less 10 % of all RAM, at least 2 GB.

        Raises BadBudget for what cannot be read or contradicts itself, DeviceUnavailable when nothing says
        how big a GPU is that this machine lacks.
        """
        _refuse_contradictions(budget, max_memory, device, gpu)
        if max_memory is not None:
            return _from_max_memory(max_memory, device, machine)
        main = _main_device(device, machine, gpu)
        limit, origin = _main_limit(main, budget, gpu, machine)
        limits = {main: limit} | _ram_beside(main, machine)
        context = _context_bytes((main,), machine) if gpu is None else CUDA_CONTEXT_BYTES
        return cls((main,), limits, origin, budget is None and gpu is None, context)


# The flags


def _refuse_contradictions(budget: str | None, max_memory: str | None, device: str, gpu: str | None) -> None:
    if not _DEVICE_FLAG.fullmatch(device):
        raise BadBudget(f"--device {device}: it is auto, cpu, cuda or cuda:N.")
    if budget is not None and max_memory is not None:
        raise BadBudget("--budget and --max-memory both set the limit of the device that computes: give one.")
    if gpu is not None and max_memory is not None:
        raise BadBudget("--gpu and --max-memory both set the limit of a GPU: give one.")
    if gpu is not None and device not in ("auto", "cuda", "cuda:0"):
        raise BadBudget(f"--gpu is the size of cuda:0, and --device is {device}: give one.")


def _main_device(device: str, machine: Machine, gpu: str | None) -> str:
    if device == "auto":
        return "cuda:0" if machine.gpus or gpu is not None else "cpu"
    kind, _, number = device.partition(":")
    return f"cuda:{int(number or 0)}" if kind == "cuda" else kind


def _main_limit(main: str, budget: str | None, gpu: str | None, machine: Machine) -> tuple[int, str]:
    """(bytes, origin) of the device that computes."""
    card = _card_bytes(gpu) if gpu is not None else None
    if budget is None:
        return (card, f"--gpu {gpu}") if card is not None else _default_limit(main, machine)
    free = card if card is not None else machine.free_bytes(main)
    limit = _limit("--budget ", budget, free)
    if card is not None and limit > card:
        raise BadBudget(
            f"--budget {budget}: of a card of {gpu} snugfit can use {card:,} bytes; the rest is the driver's."
        )
    return limit, f"--budget {budget}"


def _card_bytes(gpu: str) -> int:
    limit = _less_margin(_limit("--gpu ", gpu, None))
    if limit <= 0:
        kept = format_bytes(CARD_MARGIN_BYTES, binary=True)
        raise BadBudget(f"--gpu {gpu}: {kept} of a card stay with the driver, so nothing is left of it.")
    return limit


def _less_margin(card_bytes: int) -> int:
    return card_bytes - max(CARD_MARGIN_BYTES, card_bytes * CARD_MARGIN_PERCENT // 100)


def _default_limit(main: str, machine: Machine) -> tuple[int, str]:
    free = machine.free_bytes(main)
    if free is None:
        raise DeviceUnavailable(
            f"--device {main}: this machine has {_count_gpus(machine)}. To plan for one elsewhere, "
            "give its size (--gpu 16GiB) or what may be used of it (--budget 15GB); or take --device cpu."
        )
    if main == "cpu":
        return _default_ram(free)
    return max(_less_margin(free), 0), f"{format_bytes(free)} free on {main}, less a margin for the driver"


def _default_ram(free: int) -> tuple[int, str]:
    share, rest = free * RAM_SHARE_PERCENT // 100, max(free - STARTUP_BYTES, 0)
    if share <= rest:
        return share, f"{RAM_SHARE_PERCENT} % of {format_bytes(free)} available RAM"
    return rest, f"{format_bytes(free)} available RAM, less what the process takes before it loads"


def _context_bytes(compute: tuple[str, ...], machine: Machine) -> int:
    """The most that CUDA takes for itself of any of these GPUs."""
    counts = [gpu.multiprocessors for gpu in machine.gpus if gpu.device in compute and gpu.multiprocessors]
    return CUDA_BASE_BYTES + CUDA_MULTIPROCESSOR_BYTES * max(counts) if counts else CUDA_CONTEXT_BYTES


def _count_gpus(machine: Machine) -> str:
    count = len(machine.gpus)
    return f"{count} GPU{'s' if count > 1 else ''}" if count else "no GPU that CUDA and NVML can see"


def _ram_beside(main: str, machine: Machine) -> dict[str, int]:
    """The limit of RAM as a place for offloaded weights, when a GPU computes."""
    if main == "cpu":
        return {}
    kept = max(RAM_MARGIN_BYTES, machine.ram_total_bytes * RAM_MARGIN_PERCENT // 100)
    return {"cpu": max(machine.ram_free_bytes - kept, 0)}


# --max-memory


def _from_max_memory(text: str, device: str, machine: Machine) -> MemoryBudget:
    given = dict(_max_memory_pairs(text, machine))
    gpus = tuple(sorted((name for name in given if name.startswith("cuda:")), key=_number))
    compute = gpus or ("cpu",)
    _check_device(text, device, compute)
    missing = _ram_beside(compute[0], machine) if gpus else {"cpu": _default_limit("cpu", machine)[0]}
    limits = missing | given
    if not gpus and not limits["cpu"]:
        raise BadBudget(f"--max-memory {text}: cpu computes here, since no GPU is named, and cannot have 0.")
    ordered = {name: limits[name] for name in (*gpus, "cpu", "disk") if name in limits}
    context = _context_bytes(compute, machine)
    return MemoryBudget(compute, ordered, f"--max-memory {text}", context_bytes=context)


def _max_memory_pairs(text: str, machine: Machine) -> Iterator[tuple[str, int]]:
    """("cuda:0", bytes), ("cpu", bytes) … as they stand in the text."""
    seen: set[str] = set()
    for pair in text.split(","):
        key, equals, size = (part.strip() for part in pair.partition("="))
        if not equals or not _DEVICE.fullmatch(key.lower()):
            raise BadBudget(
                f"--max-memory {text}: {pair.strip()!r} is not DEVICE=SIZE, where DEVICE is the number of a "
                f"GPU, cpu or disk. The form is {MAX_MEMORY_FORM}."
            )
        name = f"cuda:{int(key)}" if key.isdigit() else key.lower()
        if name in seen:
            raise BadBudget(f"--max-memory {text}: {key} is there twice.")
        seen.add(name)
        yield name, _place_limit(name, key, size, machine)


def _place_limit(name: str, key: str, size: str, machine: Machine) -> int:
    if size == "0" and not name.startswith("cuda:"):
        return 0
    return _limit(f"--max-memory {key}=", size, machine.free_bytes(name))


def _check_device(text: str, device: str, compute: tuple[str, ...]) -> None:
    kind, _, number = device.partition(":")
    fits = device in ("auto", *compute) or (kind == compute[0].partition(":")[0] and not number)
    if not fits or (number and len(compute) > 1):
        raise BadBudget(f"--max-memory {text} computes on {', '.join(compute)}, and --device is {device}.")


def _number(device: str) -> int:
    return int(device.removeprefix("cuda:"))


# Sizes


def _limit(flag: str, text: str, free_bytes: int | None) -> int:
    """parse_bytes, with the flag in the message."""
    try:
        limit = parse_bytes(text, free_bytes)
    except BadBudget as err:
        raise BadBudget(f"{flag}{text}: {err}") from None
    if text.strip().isdigit() and limit < SMALLEST_BARE_BYTES:
        raise BadBudget(f"{flag}{text}: that is {limit:,} bytes. With a unit: {text.strip()}GB.")
    return limit


def parse_bytes(text: str, free_bytes: int | None = None) -> int:
    """Bytes in a size such as "16GB", "1.5 GiB", "500000000" or "90%" (of `free_bytes`), rounded down.

    KB, MB, GB and TB are powers of 1000, KiB … TiB of 1024; K, M, G, T and Ki … Ti are the same without
    the B, as in Kubernetes. Case does not matter, but for one thing: "Gb" is how gigabits are written, so it
    is refused, while "gb" and "GB" are bytes. Raises BadBudget for all else, and for less than a byte.
    """
    match = _NUMBER.fullmatch(text.strip())
    if not match:
        raise BadBudget(f"{text.strip()!r} is not a size. Accepted: {FORMS}.")
    number, unit = Fraction(match[1]), match[2]
    if unit == "%":
        return _percent(number, free_bytes)
    if not unit and "." in match[1]:
        raise BadBudget(f"{match[1]} is no whole number of bytes. Accepted: {FORMS}.")
    n_bytes = int(number * _unit_bytes(unit))
    if n_bytes < 1:
        raise BadBudget(f"{text.strip()!r} is less than a byte. Accepted: {FORMS}.")
    return n_bytes


def _percent(number: Fraction, free_bytes: int | None) -> int:
    if free_bytes is None:
        raise BadBudget(
            "nobody knows what is free there, so a percentage means nothing. Accepted: 16GB, 1.5GiB."
        )
    if not 0 < number <= 100:
        raise BadBudget("a percentage is more than 0 and at most 100.")
    n_bytes = int(free_bytes * number / 100)
    if n_bytes < 1:
        raise BadBudget("nothing is free there.")
    return n_bytes


def _unit_bytes(unit: str) -> int:
    if _BITS.fullmatch(unit):
        byte_unit = unit[:-1] + "B"
        raise BadBudget(f"{unit} is a number of bits; write {byte_unit} for bytes. Accepted: {FORMS}.")
    small = unit.lower().removesuffix("b")
    letter, binary = small.removesuffix("i"), small.endswith("i")
    power = "kmgt".find(letter) + 1 if letter else 0
    if len(letter) > 1 or (letter and not power) or (binary and not letter):
        raise BadBudget(f"{unit!r} is no unit of memory. Accepted: {FORMS}.")
    return int((1024 if binary else 1000) ** power)


def format_bytes(n_bytes: int, binary: bool = False) -> str:
    """For people, in four digits: "15.23 GB", "466.1 MB", "512 B"; `binary`: "14.19 GiB"."""
    base, units = (1024, _BINARY) if binary else (1000, _DECIMAL)
    value, power = float(n_bytes), 0
    while abs(value) >= base - 0.5 and power < len(units) - 1:
        value, power = value / base, power + 1
    shown = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{shown} {units[power]}"
