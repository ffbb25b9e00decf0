"""How far the 16-bit original is from the quantized base that the adapter was trained on.

An adapter trained on an int4 base learned beside that base's rounding errors. On the 16-bit original it meets
other weights. Per layer, the report sets the norm of the difference between the two bases against the norm of
the adapter's update: at 1, what changes under the adapter is as large as all it learned.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from exporter.manifest import layers, norm, short
from exporter.merge import Change

NAME = "snugfit_drift.json"
# Above this, others saw the merge onto the original give the worse model of the two.
LARGE_RATIO = 10.0


@dataclass(frozen=True, slots=True)
class Drift:
    """Of one layer: Frobenius norms over all its merged tensors."""

    layer: str
    drift_norm: float
    update_norm: float

    @property
    def ratio(self) -> float:
        return self.drift_norm / self.update_norm if self.update_norm else float("inf")


def by_layer(changes: Iterable[Change]) -> list[Drift]:
    """One per layer whose original was compared; empty without --original-base."""
    compared = [change for change in changes if change.drift_norm is not None]
    return [
        Drift(
            layer,
            norm([change.drift_norm or 0.0 for change in group]),
            norm([change.update_norm for change in group]),
        )
        for layer, group in layers(compared).items()
    ]


def report(drifts: Iterable[Drift]) -> Mapping[str, bytes]:
    """The report file by its name; none where nothing was compared."""
    found = {
        drift.layer: {"drift_norm": short(drift.drift_norm), "update_norm": short(drift.update_norm),
                      "ratio": short(drift.ratio) if drift.update_norm else None}
        for drift in drifts
    }  # fmt: skip
    return {NAME: (json.dumps({"layers": found}, indent=2) + "\n").encode()} if found else {}


def warning(drifts: Iterable[Drift]) -> str | None:
    """A sentence where the bases differ by far more than the adapter learned."""
    worst = max(drifts, key=lambda drift: drift.ratio, default=None)
    if worst is None or worst.ratio <= LARGE_RATIO:
        return None
    return (
        f"{worst.layer}: the original differs from what the adapter was trained on by {worst.ratio:.1f} "
        "times what the adapter changed. Compare with an export without --original-base before you use it."
    )
