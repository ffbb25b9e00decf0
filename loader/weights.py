"""Where each parameter of the built model comes from: which checkpoint tensors, and how they are joined.

transformers 5 names some parameters otherwise than checkpoints do, and fuses the experts of a layer into one
tensor. Its own conversion table (`transformers.conversion_mapping`) decides names here too; the usual fusions
are read in place, slice by slice, so that loading never holds a second copy. Whatever is rarer goes through
its converters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loader.checkpoint import ModelSpec, TensorInfo
from loader.errors import TensorMismatch, TiedWeightsDiffer
from loader.shards import ShardReader, torch_dtype

if TYPE_CHECKING:
    import torch


@dataclass
class Source:
    """The checkpoint tensors behind one parameter.

    `parts` maps a converter's source pattern to its tensors in order.
    """

    parts: dict[str, list[TensorInfo]] = field(default_factory=dict)
    converter: Any = None  # transformers' WeightConverter; None: the tensor as it is
    copy: TensorInfo | None = None  # of a tied parameter, when the file has it under both names

    def tensors(self) -> Iterator[TensorInfo]:
        for infos in self.parts.values():
            yield from infos


class CheckpointWeights(Mapping[str, "torch.Tensor"]):
    """The checkpoint seen as the built model's parameters, read on demand.

    As a Mapping it is what accelerate's hooks ask for offloaded weights: `weights[name]` reads the parameter
    from its shard into new memory, which is given back when the module that asked for it has run.
    """

    def __init__(self, spec: ModelSpec, folder: Path, model: Any, dtypes: Mapping[str, torch.dtype]) -> None:
        self._reader = ShardReader(folder)
        self._model = model
        self._dtypes = dtypes
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._sources = find_sources(spec, model, self._shapes)
        self._source = spec.source

    def refuse_different_copies(self) -> None:
        """Raise TiedWeightsDiffer: one of two matrices would be lost, since config.json says they are one."""
        for source in self._sources.values():
            first = next(source.tensors())
            if source.copy is not None and not self._reader.same(first, source.copy):
                raise TiedWeightsDiffer(self._source, first.name, source.copy.name)

    def __getitem__(self, name: str) -> torch.Tensor:
        import torch

        out = torch.empty(self._shapes[name], dtype=self._dtypes[name])
        self.fill(name, out)
        return out

    def __contains__(self, name: object) -> bool:
        return name in self._sources  # Mapping's own would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def in_file_order(self) -> list[str]:
        """Parameter names in the order in which a disk likes to read them."""
        first = {name: next(source.tensors()) for name, source in self._sources.items()}
        return sorted(first, key=lambda name: (first[name].file, first[name].start))

    def fill(self, name: str, out: torch.Tensor) -> None:
        """Write the parameter's values into `out`, casting to its dtype."""
        source = self._sources[name]
        if source.converter is None:
            self._reader.read_into(out, next(source.tensors()))
        elif places := stacked_places(source, out):
            for place, info in places:
                self._reader.read_into(place, info)
        else:
            out.copy_(self._converted(name, source))

    def _converted(self, name: str, source: Source) -> torch.Tensor:
        converter = deepcopy(source.converter)
        for pattern, infos in source.parts.items():
            for info in infos:
                converter.add_tensor(name, info.name, pattern, partial(self._read, info))
        made = converter.convert(name, model=self._model, config=self._model.config)[name]
        return made[0] if isinstance(made, list) else made

    def _read(self, info: TensorInfo) -> torch.Tensor:
        import torch

        out = torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        self._reader.read_into(out, info)
        return out

    def close(self) -> None:
        """Close the shards and let go of the model."""
        self._reader.close()
        self._model = None


def find_sources(spec: ModelSpec, model: Any, shapes: Mapping[str, torch.Size]) -> dict[str, Source]:
    """Match every checkpoint tensor to a parameter; TensorMismatch names what is amiss."""
    rename, converters = _renamer(model, shapes)
    sources: dict[str, Source] = {}
    unexpected = []
    for info in sorted(spec.tensors, key=lambda t: _natural(t.name)):
        name, pattern = rename(info.name)
        if name not in shapes:
            unexpected.append(info.name)
            continue
        source = sources.setdefault(name, Source(converter=converters.get(pattern) if pattern else None))
        source.parts.setdefault(pattern or "", []).append(info)
    _add_split_targets(sources, shapes)
    _check(spec, model, shapes, sources, unexpected)
    return _without_tied_copies(sources, model)


def _renamer(
    model: Any, shapes: Mapping[str, torch.Size]
) -> tuple[Callable[[str], tuple[str, str | None]], dict[str, Any]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [m for m in mapping if isinstance(m, WeightRenaming)]
    converters = [m for m in mapping if isinstance(m, WeightConverter)]

    def rename(key: str) -> tuple[str, str | None]:
        new, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, dict(shapes))
        if new not in shapes and key in shapes:
            return key, None
        return new, pattern

    return rename, {pattern: converter for converter in converters for pattern in converter.source_patterns}


def _natural(name: str) -> list[tuple[int, int | str]]:
    # Experts are stacked in the order of their numbers: 2 before 10.
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name)]


def _add_split_targets(sources: dict[str, Source], shapes: Mapping[str, torch.Size]) -> None:
    """A converter with several targets is filed under the first: give each of the others the same source."""
    for name, source in list(sources.items()):
        targets = source.converter.target_patterns if source.converter else []
        for other in targets[1:]:
            sibling = name.replace(targets[0], other)
            if sibling in shapes:
                sources[sibling] = source


def _check(
    spec: ModelSpec,
    model: Any,
    shapes: Mapping[str, torch.Size],
    sources: Mapping[str, Source],
    unexpected: Iterable[str],
) -> None:
    missing = [name for name in shapes if name not in sources and not _is_tied(name, sources, model)]
    # Old Llama checkpoints hold a rotary table per layer, which every loader leaves out.
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"rotary_emb\.inv_freq$"]
    unexpected = [name for name in unexpected if not any(re.search(pattern, name) for pattern in ignored)]
    wrong = [
        f"{name}: {list(found)} in the file, {list(shapes[name])} in the model"
        for name, source in sources.items()
        if (found := _shape_in_file(source)) not in (None, tuple(shapes[name]))
    ]
    if missing or unexpected or wrong:
        raise TensorMismatch(spec.source, missing, unexpected, wrong)


def _shape_in_file(source: Source) -> tuple[int, ...] | None:
    """The shape that a parameter gets, or an odd expert's; None where only a converter knows it."""
    first = next(source.tensors()).shape
    if source.converter is None:
        return first
    if not _stacks(source.converter):
        return None
    parts = [source.parts.get(pattern, []) for pattern in source.converter.source_patterns]
    if odd := [info.shape for infos in parts for info in infos if info.shape != infos[0].shape]:
        return odd[0]
    rows = sum(infos[0].shape[0] for infos in parts if infos)
    return min(len(infos) for infos in parts), rows, *first[1:]


def _is_tied(name: str, sources: Mapping[str, Source], model: Any) -> bool:
    tied = model.all_tied_weights_keys
    if name in tied:
        return tied[name] in sources
    return any(owner == name and target in sources for target, owner in tied.items())


def _without_tied_copies(sources: dict[str, Source], model: Any) -> dict[str, Source]:
    """A tied parameter is read once, under its owner's name, whichever of the two names the file has."""
    for target, owner in model.all_tied_weights_keys.items():
        if target in sources:
            found = sources.pop(target)
            kept = sources.setdefault(owner, found)
            kept.copy = None if kept is found else next(found.tensors())
    return sources


def stacked_places(source: Source, out: torch.Tensor) -> list[tuple[torch.Tensor, TensorInfo]]:
    """Slices of `out` for the fusions of MoE layers; [] for a conversion that is not one of them.

    `MergeModulelist(dim=0)` stacks experts: out[e] = part[e]; followed by `Concatenate(dim=1)`, the rows of
    gate and up come one after the other: out[e] = [gate[e]; up[e]].
    """
    if not _stacks(source.converter):
        return []
    places = []
    row = 0
    for pattern in source.converter.source_patterns:
        infos = source.parts.get(pattern, [])
        rows = infos[0].shape[0] if infos else 0
        places += [(out[expert, row : row + rows], info) for expert, info in enumerate(infos)]
        row += rows
    covered = sum(place.numel() for place, _ in places)
    return places if covered == out.numel() else []


def _stacks(converter: Any) -> bool:
    operations = [(type(op).__name__, getattr(op, "dim", None)) for op in converter.operations]
    return operations in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)])
