"""Maps every tensor of an adapter to the base's tensor that it changes, or refuses the adapter.

Only names and shapes are looked at. An adapter tensor without a place is an error and never passed over: that
is how other tools export a model without its adapter. What peft would do is the measure (0.21, tuners/lora).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from exporter.adapters import config as adapter_config
from exporter.adapters import fits, ties
from exporter.adapters.adapter import Adapter
from exporter.adapters.dora import Dora
from exporter.adapters.drafts import Draft, Drafts
from exporter.adapters.experts import ExpertsLowRank
from exporter.adapters.fits import Misfits
from exporter.adapters.lookup import BaseTensors, ExpertTensor, Stack
from exporter.adapters.lora import AddBias, Factors, LowRank, ReplaceRows
from exporter.adapters.names import Layer, Part, layers
from exporter.errors import BadAdapter
from exporter.recipe import Recipe
from exporter.weights import Stored, Weight

# The order in which modules of transformers declare the parameters of their experts, and so that in which
# peft wraps one around the other.
_DECLARED = ("gate_proj", "up_proj", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
_WRAPPED = ".base_layer"


def match(weights: Sequence[Weight], adapters: Sequence[Adapter], config: Mapping[str, Any]) -> list[Recipe]:
    """A recipe for every tensor of the base, in the base's order and under its names, with all updates in the
    order of the adapters.

    With tied embeddings there is one for the head too, at the end: `ties.resolve` says whether it stays.
    Raises BadAdapter, naming tensors and shapes, for an adapter of which anything has no place.
    """
    tensors = BaseTensors(weights, config)
    pair = ties.find_pair({weight.name: weight.shape for weight in weights}, config)
    drafts = Drafts(weights, tensors, pair if adapters else None)
    for adapter in adapters:
        _Matching(adapter, drafts, config, is_alone=len(adapters) == 1).run()
    return drafts.recipes()


class _Matching:
    """One adapter on its way into the drafts."""

    def __init__(self, adapter: Adapter, drafts: Drafts, config: Mapping[str, Any], is_alone: bool) -> None:
        self._adapter, self._drafts, self._config = adapter, drafts, config
        self._is_alone = is_alone
        self._layers = layers(adapter.source, adapter.tensors)
        self._misfits = Misfits(adapter, config)

    def run(self) -> None:
        """Whole tensors first, whose shapes all others must fit; then rows of tokens, on which LoRA adds."""
        modules: dict[str, dict[int, Layer]] = defaultdict(dict)
        for layer in self._layers:
            if Part.SAVED in layer.parts:
                self._replace(layer)
        for layer in self._layers:
            if Part.TOKENS in layer.parts:
                self._tokens(layer)
            elif Part.SAVED not in layer.parts:
                module = layer.path
                while module.endswith(_WRAPPED):
                    module = module.removesuffix(_WRAPPED)
                modules[module][(len(layer.path) - len(module)) // len(_WRAPPED)] = layer
        for module, by_depth in modules.items():
            self._module(module, by_depth)
        self._misfits.refuse()

    # Whole tensors

    def _replace(self, layer: Layer) -> None:
        stored = layer.parts[Part.SAVED]
        draft = self._drafts.find(layer.path)
        if draft is None:
            self._misfits.homeless(stored)
            return
        is_side = draft in (self._drafts.embedding, self._drafts.head)
        module = layer.path.rpartition(".")[0]
        is_trained = not is_side or adapter_config.is_trained_whole(self._adapter.config, module)
        if is_trained:
            self._refuse_weight("a whole trained tensor", stored)
        for side in self._sides(draft, Part.SAVED, is_one=not is_trained or self._is_tying()):
            if fits.is_whole(stored.shape, side.base.shape, is_side):
                side.replace(self._adapter.source, stored, is_trained)
            else:
                self._misfits.whole(stored, side.name, side.base.shape)

    def _is_tying(self) -> bool:
        return bool(self._adapter.config.get("ensure_weight_tying"))

    def _sides(self, draft: Draft, part: Part, is_one: bool) -> list[Draft]:
        """The drafts that a part goes to: both, where embedding and head are one and stay one.

        What an adapter has for the head there, beside the same for the embedding, is a copy: ties.resolve
        has it compared.
        """
        pair, embedding, head = self._drafts.pair, self._drafts.embedding, self._drafts.head
        if not is_one or pair is None or not pair.is_tied or embedding is None or head is None:
            return [draft]
        if draft not in (embedding, head):
            return [draft]
        if draft is head:
            return [] if self._speaks_of(embedding, part) else [head]
        return [embedding, head]

    def _speaks_of(self, draft: Draft, part: Part) -> bool:
        paths = [layer.path for layer in self._layers if part in layer.parts]
        return any(ties.is_named(path.removesuffix(".weight") + ".weight", draft.name) for path in paths)

    def _refuse_weight(self, what: str, stored: Stored) -> None:
        if self._adapter.weight != 1:
            raise BadAdapter(
                self._adapter.source,
                f"a weight of {self._adapter.weight:g} is asked for, and {stored.name} is {what}, which is "
                "not something added that could be scaled. Export it with weight 1.",
            )

    # What is learned beside the base's tensors

    def _module(self, module: str, by_depth: Mapping[int, Layer]) -> None:
        parameters = self._parameters(module)
        if parameters and len(parameters) == len(by_depth):
            # The parameter that was wrapped first is the innermost.
            for parameter, (_, layer) in zip(parameters, sorted(by_depth.items(), reverse=True), strict=True):
                self._parameter(module, parameter, layer)
            return
        for depth, layer in by_depth.items():
            if depth:
                self._misfits.homeless(*layer.parts.values())
            else:
                self._plain_module(layer)

    def _plain_module(self, layer: Layer) -> None:
        draft = self._drafts.find(f"{layer.path}.weight")
        parts = layer.parts
        if draft is None:
            self._misfits.homeless(*parts.values())
            return
        if Part.A in parts or Part.B in parts:
            self._linear(layer, draft)
        if Part.EMBEDDING_A in parts or Part.EMBEDDING_B in parts:
            self._embedding(layer, draft)
        if not parts.keys() & {Part.A, Part.B, Part.EMBEDDING_A, Part.EMBEDDING_B}:
            self._misfits.incomplete(layer)

    def _linear(self, layer: Layer, draft: Draft) -> None:
        a, b = layer.parts.get(Part.A), layer.parts.get(Part.B)
        if a is None or b is None:
            self._misfits.incomplete(layer)
            return
        is_transposed = self._misfits.orientation(layer.path, draft, a, b)
        if is_transposed is None:
            return
        factors = Factors(a=a, b=b, scaling=self._scaling(layer.path), transposed=is_transposed)
        for side in self._low_rank_sides(draft):
            self._low_rank(layer, side, factors, rounds_first=False)
        if Part.B_BIAS in layer.parts:
            self._bias(layer)

    def _bias(self, layer: Layer) -> None:
        stored = layer.parts[Part.B_BIAS]
        draft = self._drafts.find(f"{layer.path}.bias")
        if draft is None:
            self._misfits.add(f"{stored.name} adds to a bias, and the base has none at {layer.path}")
        elif draft.base.shape != stored.shape:
            self._misfits.whole(stored, draft.name, draft.base.shape)
        else:
            scaling = self._scaling(layer.path)
            draft.updates.append(AddBias(adapter=self._adapter.source, bias=stored, scaling=scaling))

    def _embedding(self, layer: Layer, draft: Draft) -> None:
        a, b = layer.parts.get(Part.EMBEDDING_A), layer.parts.get(Part.EMBEDDING_B)
        if a is None or b is None:
            self._misfits.incomplete(layer)
        elif self._misfits.is_embedding(layer.path, draft, a, b):
            factors = Factors(a=a, b=b, scaling=self._scaling(layer.path), transposed=True)
            for side in self._low_rank_sides(draft):
                self._low_rank(layer, side, factors, rounds_first=self._rounds_first(side.base))

    def _low_rank_sides(self, draft: Draft) -> list[Draft]:
        # peft ties A and B, and not DoRA's magnitudes: of columns at the embedding, of rows at the head.
        is_one = self._is_tying() and not self._adapter.config.get("use_dora")
        return self._sides(draft, Part.EMBEDDING_A, is_one)

    def _low_rank(self, layer: Layer, draft: Draft, factors: Factors, rounds_first: bool) -> None:
        source = self._adapter.source
        magnitude = layer.parts.get(Part.MAGNITUDE)
        if bool(self._adapter.config.get("use_dora")) != (magnitude is not None):
            self._misfits.add(
                f"{layer.path} has {'a' if magnitude else 'no'} lora_magnitude_vector, and use_dora is "
                f"{bool(self._adapter.config.get('use_dora'))}"
            )
        elif magnitude is None:
            draft.updates.append(LowRank(adapter=source, factors=factors, rounds_first=rounds_first))
        elif self._misfits.is_magnitude(layer.path, draft, magnitude, factors.transposed):
            self._refuse_weight("part of a DoRA", magnitude)
            base = draft.base if draft.updates else None
            draft.updates.append(Dora(adapter=source, factors=factors, magnitude=magnitude, base=base))

    def _tokens(self, layer: Layer) -> None:
        stored = layer.parts[Part.TOKENS]
        draft = self._drafts.find(f"{layer.path}.weight")
        if draft is None:
            self._misfits.homeless(stored)
            return
        rows = adapter_config.token_rows(self._adapter.config, layer.path)
        if not self._misfits.is_tokens(layer.path, draft, stored, rows):
            return
        self._refuse_weight("the whole rows of tokens", stored)
        for side in self._sides(draft, Part.TOKENS, is_one=self._tokens_follow()):
            taken = [u for u in side.updates if isinstance(u, ReplaceRows) and {*u.rows} & {*(rows or ())}]
            if taken:
                raise BadAdapter(
                    self._adapter.source,
                    f"{stored.name} replaces rows of {side.name} that {taken[0].adapter} replaces too: only "
                    "one of them can be there. Export with one of the two adapters.",
                )
            side.updates.append(ReplaceRows(adapter=self._adapter.source, values=stored, rows=rows or ()))

    def _tokens_follow(self) -> bool:
        """Whether a tied head follows the embedding: unless other tokens were named for it (peft)."""
        pair, config = self._drafts.pair, self._adapter.config
        if pair is None:
            return False
        embedding, head = (
            adapter_config.token_rows(config, name.removesuffix(".weight"))
            for name in (pair.embedding, pair.head)
        )
        return embedding is None or head is None or embedding == head

    # target_parameters

    def _parameters(self, module: str) -> list[str]:
        """Names of the module's parameters that target_parameters lists, in the order in which peft wraps."""
        listed = [str(name) for name in self._adapter.config.get("target_parameters") or ()]
        names = {name.rpartition(".")[2] for name in listed}
        found = [
            name
            for name in names
            if adapter_config.targets_parameter(self._adapter.config, f"{module}.{name}")
            and self._stack(module, name) is not None
        ]
        return sorted(found, key=lambda name: (_DECLARED.index(name) if name in _DECLARED else -1, name))

    def _stack(self, module: str, name: str) -> Stack | None:
        draft = self._drafts.find(f"{module}.{name}")
        if draft is not None:
            return Stack(draft.base.shape, (ExpertTensor(draft.name, 0),))
        return self._drafts.tensors.stack(module, name)

    def _parameter(self, module: str, name: str, layer: Layer) -> None:
        path = f"{module}.{name}"
        stack = self._stack(module, name)
        a, b = layer.parts.get(Part.A), layer.parts.get(Part.B)
        if stack is None or a is None or b is None or len(layer.parts) > 2:
            self._misfits.incomplete(layer)
            return
        if len(stack.shape) == 2:
            self._matrix_parameter(path, stack, a, b)
            return
        is_transposed = self._misfits.stacked(path, stack.shape, a, b)
        if is_transposed is None:
            return
        for part in stack.tensors:
            draft = self._drafts.of(part.name)
            draft.updates.append(
                ExpertsLowRank(
                    adapter=self._adapter.source, a=a, b=b, experts=stack.shape[0],
                    scaling=self._scaling(path), transposed=is_transposed,
                    rounds_first=self._rounds_first(draft.base), first_row=part.first_row,
                )
            )  # fmt: skip

    def _matrix_parameter(self, path: str, stack: Stack, a: Stored, b: Stored) -> None:
        draft = self._drafts.of(stack.tensors[0].name)
        if self._misfits.is_matrix(path, draft, a, b):
            factors = Factors(a=a, b=b, scaling=self._scaling(path))
            rounds_first = self._rounds_first(draft.base)
            draft.updates.append(
                LowRank(adapter=self._adapter.source, factors=factors, rounds_first=rounds_first)
            )

    def _scaling(self, path: str) -> float:
        return adapter_config.scaling(self._adapter.config, path) * self._adapter.weight

    def _rounds_first(self, base: Weight) -> bool:
        """Whether to give peft's very bits, which rounds twice there; a sum of adapters is rounded once."""
        return self._is_alone and self._adapter.weight == 1 and base.dtype == "BF16"
