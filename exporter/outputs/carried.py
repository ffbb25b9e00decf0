"""Which files of the base and of its adapters go into the output as they are: tokenizer, processor, licence.

Weights, configurations and the model card are written anew. What no loader needs stays behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.outputs.vocabulary import tokenizer_rows
from exporter.outputs.wording import short_name
from loader.headers import POINTER_BYTES, refuse_lfs_pointer

TEMPLATE, LEGACY_TEMPLATE, MORE_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",  # of a processor, before transformers 4.49
    "additional_chat_templates",
)
TOKENIZER_CONFIG = "tokenizer_config.json"

# Each makes a tokenizer, with what else stands beside it.
_VOCABULARY = re.compile(
    r"tokenizer(\.[\d.]+)?\.json|tokenizer\.model(\.v\d+\w*)?|vocab\.(json|txt)|.*\.tiktoken|tiktoken\.model"
    r"|tekken\.json|spiece\.model|spm\.model|sentencepiece(\.bpe)?\.model"
)
_BESIDE_IT = re.compile(
    r"tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|merges\.txt|bpe\.codes"
    r"|normalizer\.json"
)
_PROCESSOR = re.compile(r".*processor_config\.json")
_LICENCE = re.compile(r"(.*licen[cs]e.*|.*notice.*|.*use[_ -]policy.*|copying.*|copyright.*)", re.IGNORECASE)
_TEXT = frozenset({"", ".md", ".txt", ".rst", ".pdf", ".html"})
_TEMPLATE_NAME = re.compile(r"[\w-]+")


@dataclass(frozen=True, slots=True)
class Carried:
    """A file of the output. Its name may have a folder in it: "additional_chat_templates/rag.jinja"."""

    name: str
    source: Path
    content: bytes | None = None  # given where it is a part of the source

    def read(self) -> bytes:
        """The bytes that go into the output. Raises LfsPointer."""
        if self.content is not None:
            return self.content
        content = self.source.read_bytes()
        refuse_lfs_pointer(content[:POINTER_BYTES], str(self.source))
        return content


@dataclass(frozen=True)
class CarriedFiles:
    """What to carry, sorted by name; `notes` say what a user should know of it, one sentence each."""

    files: tuple[Carried, ...]
    notes: tuple[str, ...]
    tokenizer: Path | None  # the folder whose tokenizer it is
    is_adapters: bool  # that folder is an adapter's


@dataclass(frozen=True)
class Source:
    """A folder that files may come from, as the user named it."""

    label: str
    folder: Path

    @property
    def name(self) -> str:
        """What notes call it: they go into the output, where a path has no business."""
        return short_name(self.label)

    @property
    def names(self) -> list[str]:
        return sorted(entry.name for entry in self.folder.iterdir() if entry.is_file())

    def matching(self, pattern: re.Pattern[str]) -> list[str]:
        return [name for name in self.names if pattern.fullmatch(name)]

    def config(self, name: str = TOKENIZER_CONFIG) -> dict[str, Any]:
        """A JSON file; empty where there is none, or none that can be read."""
        try:
            found = json.loads((self.folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def carried(self, names: Sequence[str]) -> dict[str, Carried]:
        return {name: Carried(name, self.folder / name) for name in names}


def plan_files(
    base: Source, adapters: Sequence[Source] = (), tokenizer: bool = True, keep_remote_code: bool = False
) -> CarriedFiles:
    """What to carry from these folders; nothing is copied yet.

    The tokenizer is wholly an adapter's where one of them has one, else wholly the base's. Of several that
    differ it is the one that knows most tokens, of these the adapter's that was given last: adapters add
    tokens, and whoever added none has saved the base's. The chat template is that adapter's, else the last
    adapter's that has one, else the base's. Processors come from where the tokenizer is, else from the base;
    licences come from the base, and `*.py` of it with `keep_remote_code`. With `tokenizer` false, tokenizer
    and chat template are somebody else's matter.

    Raises LfsPointer for a file that Git-LFS has not fetched.
    """
    notes: list[str] = []
    place = _tokenizer_place(base, adapters, notes)
    files = base.carried(base.matching(_LICENCE))
    files = {name: file for name, file in files.items() if Path(name).suffix.lower() in _TEXT}
    processors = place if place and place.matching(_PROCESSOR) else base
    files |= processors.carried(processors.matching(_PROCESSOR))
    if keep_remote_code:
        files |= base.carried([name for name in base.names if name.endswith(".py")])
    if tokenizer:
        files |= _tokenizer(place, base) if place else {}
        files |= _templates(place, base, adapters)
        _note_tokenizer(place, base, keep_remote_code, notes)
    _note_licences(adapters, notes)
    _refuse_pointers(files)
    return CarriedFiles(
        tuple(files[name] for name in sorted(files)),
        tuple(notes),
        place.folder if place else None,
        place in adapters,
    )


# The tokenizer


def _tokenizer_place(base: Source, adapters: Sequence[Source], notes: list[str]) -> Source | None:
    having = [adapter for adapter in adapters if adapter.matching(_VOCABULARY)]
    if not having:
        return base if base.matching(_VOCABULARY) else None
    if len(having) == 1 or all(_same_tokenizer(having[0], other) for other in having[1:]):
        return having[-1]
    rows = [tokenizer_rows(adapter.folder) or 0 for adapter in having]
    chosen = max(range(len(having)), key=lambda at: (rows[at], at))
    others = ", ".join(f"{source.name} ({rows[at]:,})" for at, source in enumerate(having) if at != chosen)
    notes.append(
        f"the adapters' tokenizers differ: that of {having[chosen].name} is taken, which knows "
        f"{rows[chosen]:,} tokens, and not that of {others}."
    )
    return having[chosen]


def _same_tokenizer(one: Source, other: Source) -> bool:
    names = [*one.matching(_VOCABULARY), *one.matching(_BESIDE_IT)]
    return names == [*other.matching(_VOCABULARY), *other.matching(_BESIDE_IT)] and all(
        _same_bytes(one, other, name) for name in names
    )


def _same_bytes(one: Source, other: Source, name: str) -> bool:
    return (one.folder / name).read_bytes() == (other.folder / name).read_bytes()


def _tokenizer(place: Source, base: Source) -> dict[str, Carried]:
    files = place.carried([*place.matching(_VOCABULARY), *place.matching(_BESIDE_IT)])
    own, bases = place.matching(_VOCABULARY), base.matching(_VOCABULARY)
    shared = [name for name in own if name in bases]
    if "tokenizer.json" in shared and all(_same_bytes(place, base, name) for name in shared):
        # The same tokenizer: what the adapter's trainer did not save again (vocab.json, tokenizer.model)
        # is what older loaders and converters ask for.
        more = [*bases, *(name for name in base.names if name == "merges.txt")]
        files = base.carried(more) | files
    return files


def _note_tokenizer(place: Source | None, base: Source, has_code: bool, notes: list[str]) -> None:
    if place is None:
        notes.append(
            "NO TOKENIZER: neither the base nor an adapter has one, so the output has none. transformers, "
            "vLLM and snugfit serve cannot load text into it: copy tokenizer.json and tokenizer_config.json "
            "of the base's own repository into the output."
        )
        return
    code = place.config().get("auto_map")
    if isinstance(code, dict) and code.get("AutoTokenizer") and not has_code:
        notes.append(
            f"the tokenizer of {place.name} names code of its own ({TOKENIZER_CONFIG}, auto_map), which is "
            "not carried: loaders fall back to a class of theirs, or cannot read it."
        )
    if place is not base and base.matching(_VOCABULARY):
        own, bases = tokenizer_rows(place.folder) or 0, tokenizer_rows(base.folder) or 0
        if own < bases:
            notes.append(
                f"the tokenizer of {place.name} knows {own:,} tokens, and the base's {bases:,}: is it the "
                "one that the adapter was trained with?"
            )


# The chat template


def _templates(place: Source | None, base: Source, adapters: Sequence[Source]) -> dict[str, Carried]:
    """Everything that is a chat template, from the one folder that has the say in it."""
    first = [place] if place is not None and place is not base else []
    order = [*first, *reversed(adapters), base]
    owner = next((source for source in order if _has_template(source)), None)
    if owner is None:
        return {}
    files = owner.carried(_template_files(owner))
    is_told_elsewhere = owner is not place or (owner is not base and LEGACY_TEMPLATE in base.names)
    if TEMPLATE not in files and is_told_elsewhere:
        files |= _taken_out(owner)
        files.pop(LEGACY_TEMPLATE, None)
    return files


def _has_template(source: Source) -> bool:
    return bool(_template_files(source) or source.config().get("chat_template"))


def _template_files(source: Source) -> list[str]:
    more = sorted(path.name for path in (source.folder / MORE_TEMPLATES).glob("*.jinja"))
    known = [name for name in (TEMPLATE, LEGACY_TEMPLATE) if name in source.names]
    return [*known, *(f"{MORE_TEMPLATES}/{name}" for name in more)]


def _taken_out(source: Source) -> dict[str, Carried]:
    """Templates that stand in a tokenizer_config.json or a chat_template.json, as files of their own.

    A file goes before what a tokenizer_config.json says (transformers, save_chat_templates).
    """
    for name in (TOKENIZER_CONFIG, LEGACY_TEMPLATE):
        found = source.config(name).get("chat_template")
        if found:
            path = source.folder / name
            return {file: Carried(file, path, text.encode()) for file, text in _by_file(found).items()}
    return {}


def _by_file(found: Any) -> dict[str, str]:
    """One template, or a list of them with names."""
    if isinstance(found, str):
        return {TEMPLATE: found}
    files: dict[str, str] = {}
    entries = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    for entry in entries:
        name, text = str(entry.get("name")), str(entry.get("template"))
        if name == "default":
            files[TEMPLATE] = text
        elif _TEMPLATE_NAME.fullmatch(name):
            files[f"{MORE_TEMPLATES}/{name}.jinja"] = text
    return files


# The rest


def _note_licences(adapters: Sequence[Source], notes: list[str]) -> None:
    for adapter in adapters:
        if own := [n for n in adapter.matching(_LICENCE) if Path(n).suffix.lower() in _TEXT]:
            notes.append(
                f"{adapter.name} has a licence of its own ({', '.join(own)}), which is not carried: see "
                "whether its terms ask for that."
            )


def _refuse_pointers(files: dict[str, Carried]) -> None:
    for file in files.values():
        with file.source.open("rb") as stream:
            refuse_lfs_pointer(stream.read(POINTER_BYTES), str(file.source))
