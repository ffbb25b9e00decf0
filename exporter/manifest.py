"""The manifest of a finished export: what it was made of, what merging changed, and the hash of every file.

It is the last file that is written, so a folder that has one is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.errors import VerificationFailed
from exporter.merge import Change
from exporter.writer import Written

NAME = "snugfit_export.json"
FORMAT = 1
# Norms are sums over millions of numbers, in an order that another number of threads changes.
DIGITS = 5


@dataclass(frozen=True)
class Manifest:
    """What `snugfit_export.json` says."""

    plan_sha256: str
    made_of: Mapping[str, Any]  # base, adapters, options: what the plan's hash is of
    files: tuple[Written, ...]
    changes: tuple[Change, ...]

    def to_json(self) -> bytes:
        """The same bytes for the same export."""
        content = {
            "format": FORMAT,
            "plan_sha256": self.plan_sha256,
            "made_of": self.made_of,
            "changed": {change.name: _change(change) for change in self.changes},
            "files": {f.file: {"bytes": f.n_bytes, "sha256": f.sha256} for f in self.files},
        }
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _change(change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {
        "elements": change.elements,
        "changed": change.changed,
        "base_norm": short(change.base_norm),
        "update_norm": short(change.update_norm),
    }
    if change.drift_norm is not None:
        found["drift_norm"] = short(change.drift_norm)
    return found


def short(number: float) -> float:
    """A norm as it is reported: DIGITS significant digits."""
    return float(f"{number:.{DIGITS}g}")


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder; None without one. Raises VerificationFailed for one that is damaged."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_bytes())
        files = tuple(Written(name, f["bytes"], f["sha256"]) for name, f in content["files"].items())
        changes = tuple(_read_change(name, c) for name, c in content["changed"].items())
        return Manifest(content["plan_sha256"], content["made_of"], files, changes)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise VerificationFailed(
            str(path), ["is damaged, or of another version of snugfit. Export again."]
        ) from None


def _read_change(name: str, found: Mapping[str, Any]) -> Change:
    return Change(name, found["elements"], found["changed"], found["base_norm"], found["update_norm"],
                  found.get("drift_norm"))  # fmt: skip


def layers(changes: Iterable[Change]) -> dict[str, list[Change]]:
    """Changes by layer ("model.layers.3"), in their order; what is in no layer stands under its own name."""
    found: dict[str, list[Change]] = {}
    for change in changes:
        found.setdefault(layer_of(change.name), []).append(change)
    return found


def layer_of(name: str) -> str:
    parts = name.split(".")
    number = next((at for at, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])


def norm(norms: Sequence[float]) -> float:
    """Of several tensors together, from their own norms."""
    return float(sum(n * n for n in norms) ** 0.5)
