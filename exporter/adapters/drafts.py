"""Recipes in the making: what adapters do to the base's tensors, gathered one adapter after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from exporter.adapters.lookup import BaseTensors
from exporter.adapters.ties import Pair
from exporter.errors import BadAdapter
from exporter.recipe import Recipe, Update
from exporter.weights import Plain, Stored, Weight


@dataclass(slots=True, eq=False)
class Draft:
    """One tensor of the output, not finished yet."""

    name: str
    base: Weight
    updates: list[Update] = field(default_factory=list)
    owner: str | None = None  # the adapter whose whole tensor it is
    is_trained: bool = (
        False  # that tensor was trained; else it is the base's, as the adapter's trainer had it
    )

    def recipe(self) -> Recipe:
        return Recipe(self.name, self.base.shape, self.base, updates=tuple(self.updates))

    def replace(self, adapter: str, stored: Stored, is_trained: bool) -> None:
        """Take the adapter's whole tensor for the base's. Raises BadAdapter for a second trained one."""
        if self.owner is not None and (self.is_trained or is_trained):
            raise BadAdapter(
                adapter,
                f"{stored.name} is a whole tensor, and {self.owner} brings one for {self.name} too: only one "
                "of them can be there. Export with one of the two adapters.",
            )
        if self.owner is not None and stored.shape != self.base.shape:
            raise BadAdapter(
                adapter,
                f"{stored.name} is {list(stored.shape)}, and that of {self.owner} is {list(self.base.shape)}"
                ": the two were trained with vocabularies of different sizes. Export with one of them.",
            )
        if self.owner is None:
            self.base, self.owner, self.is_trained = Plain(self.name, stored), adapter, is_trained


class Drafts:
    """A draft for every tensor of the base; and for the head, where the embedding stands in for it."""

    def __init__(self, weights: Sequence[Weight], tensors: BaseTensors, pair: Pair | None) -> None:
        self.tensors, self.pair = tensors, pair
        self._drafts = {weight.name: Draft(weight.name, weight) for weight in weights}
        if pair is not None and pair.head not in self._drafts:
            self._drafts[pair.head] = Draft(pair.head, self._drafts[pair.embedding].base)

    def find(self, name: str) -> Draft | None:
        """The draft of a tensor, by the name that an adapter has for it."""
        weight = self.tensors.find(name)
        return self._drafts.get(weight.name if weight is not None else self.tensors.name_of(name))

    def of(self, name: str) -> Draft:
        return self._drafts[name]

    @property
    def embedding(self) -> Draft | None:
        return self._drafts[self.pair.embedding] if self.pair else None

    @property
    def head(self) -> Draft | None:
        return self._drafts.get(self.pair.head) if self.pair else None

    def recipes(self) -> list[Recipe]:
        return [draft.recipe() for draft in self._drafts.values()]
