"""A checkpoint's config and tensor headers, read without reading a tensor."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loader.architectures import check_architecture
from loader.errors import (
    BadIndex,
    BadPlanRequest,
    MissingShard,
    NoConfig,
    NotAModel,
    NoWeights,
    PickleWeights,
    QuantizedCheckpoint,
)
from loader.files import Folder, ModelFiles
from loader.headers import DTYPE_BITS, POINTER_BYTES, TensorInfo, refuse_lfs_pointer

__all__ = ["DTYPE_BYTES", "ModelSpec", "TensorInfo", "read"]

# Smaller ones (F4, F6) are only met in quantized checkpoints, which are refused.
DTYPE_BYTES = {dtype: bits // 8 for dtype, bits in DTYPE_BITS.items() if bits >= 8}

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Read later, by others: here it is only seen whether Git-LFS left a pointer.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "vocab.json",
    "merges.txt", "chat_template.jinja",
)  # fmt: skip

_PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt)")
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*")
# Mistral's own copy of the weights, and LoRA adapters, stand beside the model's shards.
_OTHER_SAFETENSORS = re.compile(r"(consolidated|adapter_).*")
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(@[\w./-]+)?", re.ASCII)  # owner/name, @revision
# GPTQ and AWQ; bitsandbytes; compressed-tensors; fp8 with scales.
_QUANTIZED_TENSORS = {
    "qweight": "GPTQ or AWQ", "qzeros": "GPTQ or AWQ", "absmax": "bitsandbytes", "SCB": "bitsandbytes",
    "weight_packed": "compressed-tensors", "weight_scale": "scaled weights", "weight_scale_inv": "scaled fp8",
}  # fmt: skip
_QUANTIZED_DTYPES = frozenset({"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"})


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint holds: config.json, generation_config.json and every tensor's header."""

    source: str  # what the user typed: a folder, owner/name or owner/name@revision
    path: Path | None  # the local folder; None when only headers were read from the hub
    config: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None  # a hub model's commit: `hub.fetched(spec)` gets just that

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def file_bytes(self) -> int:
        """Bytes of tensor data in all shards."""
        return sum(t.n_bytes for t in self.tensors)


def read(source: str | Path, revision: str | None = None) -> ModelSpec:
    """The model in a folder, or the hub model "owner/name" or "owner/name@revision".

    Only for a hub id is the network touched, and no weights are downloaded. `revision` is a branch, tag or
    commit of a hub model. Raises BadCheckpoint, of which every cause is a type, HubError, or BadPlanRequest
    for a revision of something that has none.
    """
    return _read(source, revision, read_files)


def read_any(source: str | Path, revision: str | None = None) -> ModelSpec:
    """As `read`, for a model of any architecture and however quantized: one to convert, not one to load.

    A generation_config.json that cannot be read counts as none.
    """
    return _read(source, revision, _read_any)


def read_files(files: ModelFiles) -> ModelSpec:
    """The model that these files are, wherever they are."""
    config = _config(files)
    check_architecture(files.source, config)
    _refuse_quantized_config(files.source, config)
    spec = _contents(files, _generation_config(files))
    _refuse_quantized_tensors(files.source, spec.tensors)
    return spec


def _read(
    source: str | Path, revision: str | None, read_there: Callable[[ModelFiles], ModelSpec]
) -> ModelSpec:
    try:
        return read_there(_locate(str(source), revision))
    except OSError as err:
        raise NotAModel(str(source), f"cannot be read: {err.strerror or err} ({err.filename}).") from err


def _read_any(files: ModelFiles) -> ModelSpec:
    try:
        generation_config = _generation_config(files)
    except NoConfig:  # no reason not to convert the weights
        generation_config = {}
    return _contents(files, generation_config)


def _generation_config(files: ModelFiles) -> Mapping[str, Any]:
    return _json(files, GENERATION_CONFIG) if GENERATION_CONFIG in files.names else {}


def _contents(files: ModelFiles, generation_config: Mapping[str, Any]) -> ModelSpec:
    config = _config(files)
    shards, index = _shards(files)
    tensors = files.tensors(shards)
    _check_names(files.source, tensors, index)
    _refuse_tokenizer_pointers(files)
    return ModelSpec(files.source, files.path, config, tuple(tensors), generation_config, files.commit)


# Where it is


def _locate(source: str, revision: str | None) -> ModelFiles:
    path = Path(source).expanduser()
    if path.is_dir():
        if revision is not None:
            raise BadPlanRequest(f"{source} is a folder: a revision ({revision}) is for models on the hub.")
        return Folder(source, path)
    if path.exists():
        raise NotAModel(source, _what_file(path))
    if not HUB_ID.fullmatch(source):
        form = "owner/name or owner/name@revision"
        raise NotAModel(source, f"there is no such folder, and it is no hub id, which has the form {form}.")
    from loader import hub

    return hub.files(source, revision)


def _what_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return "is a GGUF file. snugfit reads safetensors: give the folder or hub id of the original model."
    if path.suffix in (".safetensors", ".json"):
        return f"is one file of a model. Give its folder: {path.parent}"
    return "is a file. Give a model's folder or its hub id."


# config.json


def _config(files: ModelFiles) -> Mapping[str, Any]:
    if CONFIG in files.names:
        return _json(files, CONFIG)
    if not files.names:
        raise NoConfig(files.source, "the folder is empty: there is no config.json.")
    if "adapter_config.json" in files.names:
        raise NoConfig(
            files.source,
            "is a LoRA adapter, not a model. Merge it into its base first: "
            f"snugfit export --base BASE --adapter {files.source} --out OUT",
        )
    raise NoConfig(
        files.source, "there is no config.json. Give the folder that holds config.json and *.safetensors."
    )


def _json(files: ModelFiles, name: str) -> Mapping[str, Any]:
    try:
        content = json.loads(files.read(name))
    except (ValueError, RecursionError) as err:
        raise NoConfig(files.source, f"{name} is not valid JSON ({err}). Fetch it again.") from None
    if not isinstance(content, dict):
        raise NoConfig(files.source, f"{name} holds {type(content).__name__}, not an object. Fetch it again.")
    return content


def _refuse_quantized_config(source: str, config: Mapping[str, Any]) -> None:
    for holder in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder, Mapping) and holder.get(key):
                raise QuantizedCheckpoint(source, _method(holder[key]))


def _method(settings: Any) -> str:
    """ "gptq, 4 bits" """
    if not isinstance(settings, Mapping):
        return "by an unknown method"
    bits = settings.get("bits") or next((n for n in (4, 8) if settings.get(f"load_in_{n}bit")), None)
    name = str(settings.get("quant_method") or settings.get("format") or "by an unknown method")
    return f"{name}, {bits} bits" if bits else name


# Shards


def _shards(files: ModelFiles) -> tuple[list[str], Mapping[str, str]]:
    """(names of the weight files, tensor -> file as the index says; empty without one)."""
    if SINGLE in files.names:  # as in transformers: a single file goes before an index
        return [SINGLE], {}
    if INDEX in files.names:
        index = _index(files)
        shards = sorted(set(index.values()))
    else:
        index, shards = {}, _unindexed(files.names)
    if missing := [name for name in shards if name not in files.names]:
        _refuse_pickles_only(files, missing, shards)
        raise MissingShard(files.source, missing, len(shards))
    if not shards:
        _refuse_pickles_only(files, [], [])
        raise NoWeights(files.source, [name for name in sorted(files.names) if name.endswith(".gguf")])
    return shards, index


def _index(files: ModelFiles) -> Mapping[str, str]:
    """`weight_map` of the index, as save_pretrained writes it: tensor -> file."""
    weight_map = _json(files, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadIndex(files.source, f"{INDEX} has no weight_map.")
    for tensor, name in weight_map.items():
        # A name with a folder in it could lead out of the model's own.
        if not isinstance(name, str) or not name.endswith(".safetensors") or re.search(r"[/\\:]", name):
            reason = f"puts {tensor} into {name!r}, which is not the name of a safetensors file"
            raise BadIndex(files.source, f"{INDEX} {reason}.")
    return weight_map


def _unindexed(names: Iterable[str]) -> list[str]:
    """Weight files when there is no index: every one, and those that the numbering says there should be."""
    found = {n for n in names if n.endswith(".safetensors") and not _OTHER_SAFETENSORS.fullmatch(n)}
    for match in filter(None, map(_NUMBERED.fullmatch, list(found))):
        stem, total = match[1], int(match[3])
        found |= {f"{stem}-{number:05d}-of-{total:05d}.safetensors" for number in range(1, total + 1)}
    return sorted(found)


def _refuse_pickles_only(files: ModelFiles, missing: list[str], shards: list[str]) -> None:
    pickles = sorted(n for n in files.names if _PICKLES.fullmatch(n) and not _NOT_WEIGHTS.fullmatch(n))
    if pickles and len(missing) == len(shards):
        raise PickleWeights(files.source, pickles)


def _check_names(source: str, tensors: list[TensorInfo], index: Mapping[str, str]) -> None:
    """No tensor twice, and every one that the index names is where it says."""
    if twice := [name for name, count in Counter(t.name for t in tensors).items() if count > 1]:
        where = sorted(t.file for t in tensors if t.name == twice[0])
        shards = " and in ".join(where)
        raise BadIndex(source, f"{twice[0]} is in {shards}: shards of two models are mixed here.")
    found = {t.name: t.file for t in tensors}
    if lost := [name for name, file in index.items() if found.get(name) != file]:
        raise BadIndex(
            source,
            f"{INDEX} names {len(lost)} tensors that are not where it says: {lost[0]} is not in "
            f"{index[lost[0]]}. Index and shards are of different models, or the download was cut short.",
        )


def _refuse_quantized_tensors(source: str, tensors: Iterable[TensorInfo]) -> None:
    for tensor in tensors:
        if method := _QUANTIZED_TENSORS.get(tensor.name.rpartition(".")[2]):
            raise QuantizedCheckpoint(source, f"{method}: it has {tensor.name}")
        if tensor.dtype in _QUANTIZED_DTYPES:
            raise QuantizedCheckpoint(source, f"{tensor.name} is {tensor.dtype}")


def _refuse_tokenizer_pointers(files: ModelFiles) -> None:
    # The hub serves the files themselves, never pointers.
    for name in TOKENIZER_FILES:
        if files.path and name in files.names:
            with (files.path / name).open("rb") as stream:
                refuse_lfs_pointer(stream.read(POINTER_BYTES), str(files.path / name))
