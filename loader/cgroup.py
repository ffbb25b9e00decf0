"""What control groups allow this process: memory and processor time (man 7 cgroups; nothing but on Linux)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def memory_limits(proc_cgroup: Path, root: Path) -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of the groups that hold this process, the innermost first."""
    for folder, version in _groups(proc_cgroup, root, "memory"):
        found = _limit_v2(folder) if version == 2 else _limit_v1(folder)
        if found is not None:
            yield found


def cpu_limits(proc_cgroup: Path, root: Path) -> Iterator[float]:
    """Cores' worth of time, of each group that limits it."""
    for folder, version in _groups(proc_cgroup, root, "cpu"):
        if version == 2:
            quota, period = (*_words(folder / "cpu.max"), "", "")[:2]
        else:
            quota, period = (
                "".join(_words(folder / f"cpu.cfs_{name}_us")[:1]) for name in ("quota", "period")
            )
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max" or -1: no limit
            yield int(quota) / int(period)


def _groups(proc_cgroup: Path, root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version of cgroups) of the groups around this process that may control it.

    `proc_cgroup` has a line "ID:CONTROLLERS:PATH" per hierarchy: "0::/…" is version 2. In a container the
    path may be the host's and missing under `root`, where the container's own group then is.
    """
    try:
        lines = proc_cgroup.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            hierarchies, version = (root, root / "unified"), 2
        elif controller in controllers.split(","):
            hierarchies, version = (root / controller, root / controllers), 1
        else:
            continue
        for top in dict.fromkeys(hierarchies):
            yield from ((folder, version) for folder in _with_parents(top, path))


def _with_parents(top: Path, path: str) -> Iterator[Path]:
    """The group's folder and those around it up to `top`: every one of their limits counts."""
    inside = PurePosixPath(*(part for part in path.split("/") if part not in ("", ".", "..")))
    yield from (top / parent for parent in (inside, *inside.parents))


def _limit_v2(folder: Path) -> tuple[int, int] | None:
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    return _group(folder, limits, "memory.current", "inactive_file")


def _limit_v1(folder: Path) -> tuple[int, int] | None:
    # "No limit" is a number near 2^63 here, which min() with the machine's RAM makes harmless.
    return _group(
        folder, [_number(folder / "memory.limit_in_bytes")], "memory.usage_in_bytes", "total_inactive_file"
    )


def _group(folder: Path, limits: list[int | None], usage: str, cache_key: str) -> tuple[int, int] | None:
    """A group's (limit, use). Cached file pages that nobody reads are given up under pressure: not in use."""
    known = [limit for limit in limits if limit is not None]
    used = _number(folder / usage)
    if not known or used is None:
        return None
    return min(known), max(used - _stat(folder / "memory.stat", cache_key), 0)


def _number(file: Path) -> int | None:
    """The number in a control file; None for "max" and for no file."""
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def _stat(file: Path, key: str) -> int:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


def _words(file: Path) -> list[str]:
    """What stands in a control file; nothing for no file."""
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []
