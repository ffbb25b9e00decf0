"""The plan of an export: every tensor, every file and every byte of the output, from headers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from exporter import bases
from exporter.adapters import adapter as adapter_files
from exporter.adapters import targets, ties
from exporter.adapters.adapter import Adapter
from exporter.conversion import qwen1, tiktoken_vocabulary
from exporter.fingerprint import base_sha256, file_sha256, sha256_of
from exporter.outputs.card import CARD
from exporter.outputs.carried import CarriedFiles, Source, plan_files
from exporter.outputs.config import output_config
from exporter.recipe import Recipe
from exporter.shards import OutputShard, in_layer_order, pack
from exporter.spec import ExportSpec
from exporter.weights import Weight
from loader import architectures, checkpoint
from loader.checkpoint import ModelSpec
from loader.usage import version


@dataclass(frozen=True)
class ExportPlan:
    """What an export will do. `shards` hold the recipes of all tensors in their final order."""

    spec: ExportSpec
    base: ModelSpec
    original: ModelSpec | None
    method: str | None  # how the base is quantized
    adapters: tuple[Adapter, ...]
    shards: tuple[OutputShard, ...]
    config: Mapping[str, Any]  # config.json of the output
    carried: CarriedFiles | None  # None while the base is on the hub
    must_be_zero: tuple[Weight, ...] = ()  # tensors with no place in the output
    must_be_equal: tuple[tuple[Weight, Weight], ...] = ()  # tied matrices that the base has both of
    notes: tuple[str, ...] = ()

    @property
    def recipes(self) -> list[Recipe]:
        return [recipe for shard in self.shards for recipe in shard.recipes]

    @cached_property
    def total_bytes(self) -> int:
        """Of the weight files."""
        return sum(shard.n_bytes for shard in self.shards)

    @cached_property
    def made_of(self) -> dict[str, Any]:
        """What the output depends on, for its manifest. Needs base and adapters on this machine."""
        assert self.carried is not None
        found: dict[str, Any] = {
            "snugfit": version(),
            "base": {**_identity(self.base), "quantized": self.method},
            "adapters": [_adapter(adapter) for adapter in self.adapters],
            "shard_bytes": self.spec.shard_bytes,
            "files": {file.name: hashlib.sha256(file.read()).hexdigest() for file in self.carried.files},
        }
        return found | ({"original_base": _identity(self.original)} if self.original else {})

    @cached_property
    def sha256(self) -> str:
        """The same for two plans that give the same bytes."""
        return sha256_of(self.made_of)

    @cached_property
    def run_sha256(self) -> str:
        """The same for two runs that may share shards: of the plan, and of the times of the base's files.

        Not all bytes of a base are in the plan's; while it is exported, it must not change.
        """
        bases = [base for base in (self.base, self.original) if base is not None]
        return sha256_of({"plan": self.sha256, "files": [_stamps(base) for base in bases]})


def _identity(spec: ModelSpec) -> dict[str, Any]:
    """A hub id with its commit, or the name of a folder: the rest of a path is this machine's business."""
    repo = f"{spec.source.partition('@')[0]}@{spec.revision}"
    name = Path(spec.source).absolute().name if spec.revision is None else repo
    assert spec.path is not None
    return {"name": name, "sha256_of_sample": base_sha256(spec), "sha256": _small_files(spec.path)}


def _small_files(folder: Path) -> dict[str, str]:
    """Hashes of what is read and not carried: the card's licence, and the vocabulary of a Qwen v1."""
    names = (CARD, tiktoken_vocabulary.VOCABULARY, tiktoken_vocabulary.TOKENIZER_CONFIG)
    return {name: file_sha256(folder / name) for name in names if (folder / name).is_file()}


def _stamps(spec: ModelSpec) -> list[tuple[str, int, int]]:
    """(name, size, time of the last change) of a base's weight files."""
    assert spec.path is not None
    names = sorted({tensor.file for tensor in spec.tensors})
    found = [(name, (spec.path / name).stat()) for name in names]
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]


def _adapter(adapter: Adapter) -> dict[str, Any]:
    files = ("adapter_config.json", "adapter_model.safetensors")
    return {
        "name": Path(adapter.source).absolute().name,
        "weight": adapter.weight,
        "sha256": {name: file_sha256(adapter.folder / name) for name in files} | _small_files(adapter.folder),
    }


def make_plan(
    spec: ExportSpec, base: ModelSpec | None = None, original: ModelSpec | None = None
) -> ExportPlan:
    """Read headers and adapters' configs; give every tensor its place.

    `base` and `original` are given where they have been read already: a branch of the hub may have moved on.
    Raises LoaderError, of which every cause is a type: BadCheckpoint, BadAdapter, BadQuantization, HubError.
    """
    base = base or checkpoint.read_any(spec.base)
    if original is None and spec.original_base:
        original = checkpoint.read_any(spec.original_base)
    read = tuple(adapter_files.read(ref.source, ref.weight) for ref in spec.adapters)
    onto = bases.onto(base, original)
    tied = ties.resolve(targets.match(onto.weights, read, base.config), base.config, read)
    recipes = bases.with_drift(tied.recipes, onto)
    config, zero = base.config, onto.must_be_zero
    if qwen1.is_qwen1(base.config):
        recipes, config, biases = qwen1.convert(recipes, base.config)
        zero = (*zero, *biases)
    notes = (
        *adapter_files.base_identity_notes(read, spec.base, onto.method),
        *onto.notes,
        *tied.notes,
    )
    return ExportPlan(
        spec=spec, base=base, original=original, method=onto.method, adapters=read,
        shards=pack(in_layer_order(recipes), spec.shard_bytes),
        config=output_config(config, tied.changes, keeps_remote_code(base)),
        carried=_carried(base, read), must_be_zero=tuple(zero), must_be_equal=tied.must_be_equal, notes=notes,
    )  # fmt: skip


def keeps_remote_code(base: ModelSpec) -> bool:
    """Whether the output needs the base's own Python code: nobody else has code for it."""
    has_own = bool(base.config.get("auto_map")) and not qwen1.is_qwen1(base.config)
    return has_own and not architectures.knows(base.model_type)


def _carried(base: ModelSpec, adapters: tuple[Adapter, ...]) -> CarriedFiles | None:
    if base.path is None:
        return None
    return plan_files(
        Source(base.source, base.path),
        [Source(adapter.source, adapter.folder) for adapter in adapters],
        tokenizer=not qwen1.is_qwen1(base.config),
        keep_remote_code=keeps_remote_code(base),
    )
