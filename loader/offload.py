"""Which weights leave a device that cannot hold them all, so that the fewest bytes are copied at every step.

accelerate's hooks copy a module's weights to the device right before it runs and drop them after it, so
whatever leaves also needs room to come back: the largest module that left is the staging. Leaving small
modules only keeps the staging small; leaving large ones frees more. Both are tried.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from loader.footprint import WeightUnit

# MLP matrices and attention projections; an untied head when those are not enough; an untied embedding at the
# very last, because the hooks copy all of it for the few rows that a step reads. Norms and buffers never.
TIERS = (("mlp", "attention"), ("head",), ("embed",))
ORDER = tuple(kind for tier in TIERS for kind in tier)


@dataclass(frozen=True, slots=True)
class Offload:
    """Units that leave, in the order in which they were given up."""

    units: tuple[WeightUnit, ...]

    @property
    def n_bytes(self) -> int:
        return sum(unit.n_bytes for unit in self.units)

    @property
    def staging_bytes(self) -> int:
        return max((unit.n_bytes for unit in self.units), default=0)


class Offloader:
    """The choices for one set of units; built once, asked for many budgets."""

    def __init__(self, units: Sequence[WeightUnit]) -> None:
        self.total_bytes = sum(unit.n_bytes for unit in units)
        tied = {unit.tied_to for unit in units if unit.tied_to}
        self._units = sorted((unit for unit in units if _may_leave(unit, tied)), key=_giving_order)
        self._chains = [list(self._chains_of(tier)) for tier in range(len(TIERS))]

    def _chains_of(self, tier: int) -> Iterator[_Chain]:
        kinds = {kind for allowed in TIERS[: tier + 1] for kind in allowed}
        allowed = [unit for unit in self._units if unit.kind in kinds]
        for staging in sorted({unit.n_bytes for unit in allowed}):
            yield _Chain([unit for unit in allowed if unit.n_bytes <= staging], staging)

    def choices(self, room_bytes: int) -> Iterator[Offload]:
        """Every way to hold the rest and the staging in `room_bytes`: the fewest bytes first within each
        tier.

        What is chosen for a larger room never has more bytes than for a smaller one, chain by chain; so
        whatever fits at one budget fits at every larger one.
        """
        if self.total_bytes <= room_bytes:
            yield Offload(())
            return
        for chains in self._chains:
            found = (chain.shortest(self.total_bytes + chain.staging_bytes - room_bytes) for chain in chains)
            yield from sorted((choice for choice in found if choice), key=lambda choice: choice.n_bytes)


class _Chain:
    """Units no larger than `staging_bytes`, in the order in which they are given up."""

    def __init__(self, units: list[WeightUnit], staging_bytes: int) -> None:
        self.staging_bytes = staging_bytes
        self._units = units
        self._sums = list(accumulate(unit.n_bytes for unit in units))

    def shortest(self, needed_bytes: int) -> Offload | None:
        """The first units that free `needed_bytes`; for the last, the smallest later one that is enough."""
        last = bisect_left(self._sums, needed_bytes)
        if last == len(self._units):
            return None
        missing = needed_bytes - (self._sums[last - 1] if last else 0)
        enough = (unit for unit in self._units[last:] if unit.n_bytes >= missing)
        return Offload((*self._units[:last], min(enough, key=lambda unit: unit.n_bytes)))


def _may_leave(unit: WeightUnit, tied: set[str]) -> bool:
    """A tied matrix stays: offloaded, it would be copied whole twice a step, and the hooks would untie it."""
    return unit.kind in ORDER and unit.n_bytes > 0 and unit.tied_to is None and unit.module not in tied


def _giving_order(unit: WeightUnit) -> tuple[int, int, int]:
    return ORDER.index(unit.kind), -(unit.layer or 0), -unit.n_bytes
