"""Reads a LoRA adapter: its config and the header of its weights. No tensor is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.adapters import config as adapter_config
from exporter.errors import BadAdapter
from exporter.outputs.wording import short_name
from exporter.weights import Stored
from loader.checkpoint import HUB_ID
from loader.files import Folder, read_header

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# Of a hub repository: adapters are small, but checkpoints and optimizer states may lie beside them.
WANTED = (CONFIG, WEIGHTS, "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
UNWANTED = ("*/*", "trainer_state.json")
FLOATS = ("BF16", "F16", "F32", "F64")

_TOKENIZER = re.compile(
    r"tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template\..*"
    r"|.*\.tiktoken|tiktoken\.model|tekken\.json|spiece\.model|sentencepiece.*\.model"
)
_HUB_CACHE = re.compile(r"models--[^/\\]+--([^/\\]+)[/\\]snapshots")
_QUANTIZED_NAME = re.compile(
    r"(?<![a-z])(w4a16|w8a8|w8a16|int[348]|gptq|awq|bnb|nf4|fp8|[348]-?bits?)(?![a-z])"
)


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter, as far as planning needs it."""

    source: str  # what the user typed: a folder, owner/name or owner/name@revision
    folder: Path
    weight: float  # what its update is multiplied with
    config: Mapping[str, Any]
    tensors: tuple[Stored, ...]
    tokenizer_files: tuple[str, ...] = ()  # their names, where a tokenizer was saved beside it

    @property
    def kind(self) -> str:
        """ "LoRA, r=16, alpha=32" """
        return adapter_config.kind(self.config)

    @property
    def trained_on(self) -> str | None:
        """The base that its trainer noted: a hub id, or a path on the trainer's machine."""
        name = self.config.get("base_model_name_or_path")
        return name if isinstance(name, str) and name else None


def read(reference: str, weight: float = 1.0) -> Adapter:
    """The adapter in a folder, or the hub's "owner/name" or "owner/name@revision", which is downloaded.

    Raises BadAdapter for what cannot be read or is of a kind that cannot be merged, BadHeader, TruncatedShard
    or LfsPointer for a broken file, and HubError.
    """
    try:
        return _read(reference, _folder(reference), float(weight))
    except OSError as err:
        raise BadAdapter(reference, f"cannot be read: {err.strerror or err} ({err.filename}).") from err


def _folder(reference: str) -> Path:
    path = Path(reference).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise BadAdapter(reference, f"is a file. Give the adapter's folder: {path.parent}")
    if not HUB_ID.fullmatch(reference):
        form = "owner/name or owner/name@revision"
        raise BadAdapter(
            reference, f"there is no such folder, and it is no hub id, which has the form {form}."
        )
    return _download(reference)


def _download(reference: str) -> Path:
    from huggingface_hub import snapshot_download

    from loader.hub_errors import explained

    repo, _, revision = reference.partition("@")
    with explained(reference, revision or None):
        return Path(
            snapshot_download(
                repo, revision=revision or None, allow_patterns=[*WANTED], ignore_patterns=[*UNWANTED]
            )
        )


def _read(source: str, folder: Path, weight: float) -> Adapter:
    files = Folder(source, folder)
    if CONFIG not in files.names:
        raise BadAdapter(source, f"there is no {CONFIG}{_what_instead(folder, files.names)}")
    config = _config(source, files)
    adapter_config.check(source, config)
    if WEIGHTS not in files.names:
        raise _no_weights(source, files.names)
    tensors = tuple(Stored(info, folder) for info in read_header(folder / WEIGHTS))
    _check_tensors(source, tensors)
    tokenizer = sorted(name for name in files.names if _TOKENIZER.fullmatch(name))
    return Adapter(source, folder, weight, config, tensors, tuple(tokenizer))


def _config(source: str, files: Folder) -> Mapping[str, Any]:
    try:
        content = json.loads(files.read(CONFIG))
    except (ValueError, RecursionError) as err:
        raise BadAdapter(source, f"{CONFIG} is not valid JSON ({err}). Fetch it again.") from None
    if not isinstance(content, dict):
        raise BadAdapter(source, f"{CONFIG} holds {type(content).__name__}, not an object. Fetch it again.")
    return content


def _what_instead(folder: Path, names: Iterable[str]) -> str:
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if inner:
        return f" here, but there is one in {', '.join(inner[:5])}: give that folder, {folder / inner[-1]}"
    if "config.json" in names:
        return ": this is a whole model. Give it as --base, or give the adapter's folder."
    return ". Give the folder that holds it, as peft's save_pretrained writes it."


def _no_weights(source: str, names: Iterable[str]) -> BadAdapter:
    if PICKLE in names:
        return BadAdapter(
            source,
            f"its weights are only in {PICKLE}, a pickle, which can run code when it is opened, so snugfit "
            "never opens it. Convert it once, in a place you trust: "
            'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{PICKLE}', map_location='cpu', weights_only=True), '{WEIGHTS}')\"",
        )
    return BadAdapter(
        source,
        f"there is a {CONFIG} but no {WEIGHTS}. Fetch the weights too; if they are in {PICKLE}, a pickle, "
        "convert that first.",
    )


def _check_tensors(source: str, tensors: Sequence[Stored]) -> None:
    if not tensors:
        raise BadAdapter(source, f"{WEIGHTS} holds no tensors: the training saved nothing.")
    if empty := [stored.name for stored in tensors if not stored.n_elements]:
        raise BadAdapter(
            source,
            f"{len(empty)} of {len(tensors)} tensors are empty ({', '.join(empty[:3])}"
            f"{', …' if len(empty) > 3 else ''}): it was saved before DeepSpeed or FSDP had gathered the "
            "weights. Save it again with the parameters gathered.",
        )
    if other := [stored for stored in tensors if stored.info.dtype not in FLOATS]:
        raise BadAdapter(
            source,
            f"{other[0].name} is {other[0].info.dtype}, and {len(other) - 1} more are no plain floats "
            f"({', '.join(FLOATS)}): a quantized adapter, or one saved with quantized weights of its base.",
        )


# Which base it belongs to


def base_identity_notes(adapters: Sequence[Adapter], base_source: str, base_method: str | None) -> list[str]:
    """What a user should know where an adapter's own note of its base is another than --base.

    `base_method` is how --base is quantized, if it is. Notes go into the output: they hold no paths.
    """
    notes = []
    base = short_name(base_source)
    for adapter in adapters:
        named = adapter.trained_on
        if named is None or _last(named) == _last(base_source):
            continue
        if not base_method and _QUANTIZED_NAME.search(_last(named)):
            notes.append(_quantized_note(short_name(adapter.source), short_name(named), base))
        else:
            notes.append(
                f"{short_name(adapter.source)} was trained on {short_name(named)}, by its own account, and "
                f"--base is {base}: right only if these are the same weights."
            )
    return notes


def _quantized_note(adapter: str, named: str, base: str) -> str:
    return (
        f"{adapter} was trained on {named}, a quantized base by its name, and --base is {base}: it meets "
        f"other weights here than in training. Exactly what was trained: --base {named}. The same merge as "
        f"now with a report of the difference: --base {named} --original-base {base}."
    )


def _last(name: str) -> str:
    """The name in a path or hub id, without a revision, in lower case; also in the path of a hub's cache."""
    if cached := _HUB_CACHE.search(name):
        return cached[1].lower()
    return re.split(r"[/\\]", name.partition("@")[0].rstrip("/\\"))[-1].lower()
