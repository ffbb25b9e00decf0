"""README.md of the output: what it was made of, what merging changed, its hashes, how it is loaded.

The front matter is as the hub reads it (its page on model cards): base_model, base_model_relation, licence.
There is no date and no path in it, so that the same export writes the same card.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from exporter.drift import LARGE_RATIO, Drift
from exporter.manifest import layers, norm
from exporter.merge import Change
from exporter.outputs.wording import hub_id, listed
from exporter.writer import Written

CARD = "README.md"

_FRONT_MATTER = re.compile(r"\A\s*---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Licence:
    """What a model card's front matter says of its licence; empty where it says nothing."""

    license: str | tuple[str, ...] | None = None
    license_name: str | None = None
    license_link: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """One adapter. `name` is a short_name, `kind` such as "LoRA, r=16, alpha=32"."""

    name: str
    weight: float = 1.0
    kind: str = ""


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. Names are those of wording.short_name, in the notes too."""

    base: str
    adapters: tuple[AdapterFacts, ...]
    shards: tuple[Written, ...]
    shard_bytes: int  # the size that was asked for
    parameters: int
    base_models: tuple[str, ...] = ()  # hub ids, for the front matter
    revision: str | None = None  # the base's commit
    quantized: str | None = None  # "gptq, 4 bits": how the base's weights are stored
    original: str | None = None  # with --original-base, the 16-bit model that was merged onto
    architecture: str | None = None
    licence: Licence = Licence()
    changes: tuple[Change, ...] = ()
    drifts: tuple[Drift, ...] = ()
    notes: tuple[str, ...] = ()  # repairs and warnings, one sentence each
    pipeline_tag: str = "text-generation"


def licence_of(card: str) -> Licence:
    """The licence in a base's README.md; an empty one where there is none, or none that can be read."""
    found = _front_matter(card)
    names = found.get("license")
    if isinstance(names, list):
        names = tuple(str(name) for name in names)
    texts = {key: found.get(key) for key in ("license_name", "license_link")}
    return Licence(
        names if isinstance(names, str | tuple) else None,
        **{key: text if isinstance(text, str) else None for key, text in texts.items()},
    )


def _front_matter(card: str) -> Mapping[str, Any]:
    import yaml

    match = _FRONT_MATTER.match(card.removeprefix("\ufeff"))
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def model_card(facts: CardFacts) -> str:
    """README.md: YAML front matter and Markdown, the same text for the same facts."""
    parts = [
        f"---\n{_metadata(facts)}---",
        f"# {_title(facts)}",
        _summary(facts),
        "## How it was made",
        _table(("", ""), list(_recipe(facts))),
        *_proof(facts),
        *_drift(facts),
        *_notes(facts),
        *_LOADING,
        "## Files",
        _table(("file", "bytes", "sha256"), [(f.file, f"{f.n_bytes:,}", f.sha256) for f in facts.shards]),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(facts: CardFacts) -> str:
    import yaml

    licence = facts.licence
    names = list(licence.license) if isinstance(licence.license, tuple) else licence.license
    found: dict[str, Any] = {
        "license": names,
        "license_name": licence.license_name,
        "license_link": licence.license_link,
        "library_name": "transformers",
        "pipeline_tag": facts.pipeline_tag,
        "base_model": list(facts.base_models),
        "base_model_relation": "merge" if facts.adapters and facts.base_models else None,
        "tags": [*(["lora", "merge"] if facts.adapters else []), "bf16", "snugfit"],
    }
    said = {key: value for key, value in found.items() if value}
    return yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=2**30)


def _title(facts: CardFacts) -> str:
    names = [facts.original or facts.base, *(adapter.name for adapter in facts.adapters)]
    return " + ".join(_plain((hub_id(name) or name).rpartition("/")[2]) for name in names)


def _summary(facts: CardFacts) -> str:
    onto, method = _code(facts.original or facts.base), _plain(facts.quantized or "")
    merged = [_code(adapter.name) for adapter in facts.adapters]
    made = f"{onto} with {listed(merged)} merged into it" if merged else f"{onto} in bf16"
    sentences = [f"{made}, by `snugfit export`."]
    if facts.original:
        sentences.append(
            f"The adapter was trained on {_code(facts.base)} ({method or 'another base'}); here it "
            "is on the 16-bit original, whose weights are not quite those it learned beside."
        )
    elif method:
        sentences.append(
            f"The base's weights were quantized ({method}). They are written here as the numbers "
            "that they stood for, which is what was merged with: what quantizing lost has not come back."
        )
    return " ".join(sentences)


def _recipe(facts: CardFacts) -> Iterator[tuple[str, ...]]:
    stored = f", quantized: {_plain(facts.quantized)}" if facts.quantized else ""
    yield "base", f"{_code(facts.base)}{f' at {_code(facts.revision)}' if facts.revision else ''}{stored}"
    if facts.original:
        yield "merged onto", _code(facts.original)
    for adapter in facts.adapters:
        kind = f", {_plain(adapter.kind)}" if adapter.kind else ""
        yield "adapter", f"{_code(adapter.name)}, weight {adapter.weight:g}{kind}"
    if facts.architecture:
        yield "architecture", _code(facts.architecture)
    yield "parameters", f"{facts.parameters:,}"
    yield "arithmetic", "merged in fp32, rounded once"
    yield "dtype", "bfloat16"
    yield "shards", f"{len(facts.shards)}, split at {facts.shard_bytes:,} bytes"


def _proof(facts: CardFacts) -> list[str]:
    changes = facts.changes
    if not changes:
        return []
    changed, elements = sum(c.changed for c in changes), sum(c.elements for c in changes)
    lines = [
        f"{len(changes)} tensors were merged: {changed:,} of their {elements:,} elements differ from the "
        f"base. The update's norm is {_relative(changes)} of the base's."
    ]
    by_layer = {layer: _relative(group) for layer, group in layers(changes).items()}
    return ["## What merging changed", *lines, _table(("layer", "update / base"), list(by_layer.items()))]


def _relative(changes: Sequence[Change]) -> str:
    base = norm([change.base_norm for change in changes])
    return f"{norm([change.update_norm for change in changes]) / base:.2%}" if base else "all"


def _drift(facts: CardFacts) -> list[str]:
    if not facts.drifts:
        return []
    text = (
        "The norm of the difference between the 16-bit original and the base that the adapter was trained "
        f"on, over the norm of the update. Above {LARGE_RATIO:g}, what changed under the adapter is far more "
        "than what it learned."
    )
    rows = [(drift.layer, f"{drift.ratio:.2f}") for drift in facts.drifts]
    return ["## Drift of the base", text, _table(("layer", "drift / update"), rows)]


def _notes(facts: CardFacts) -> list[str]:
    return ["## Notes", "\n".join(f"- {_plain(note)}" for note in facts.notes)] if facts.notes else []


_LOADING = (
    "## How to load it",
    "`PATH` is this folder, or its id on the hub.",
    "```sh\nsnugfit verify PATH  # every byte against the hashes below\nsnugfit serve PATH\n"
    "vllm serve PATH\n```",
    "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")\n'
    'tokenizer = AutoTokenizer.from_pretrained("PATH")\n```',
)


# Markdown


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: str) -> str:
    """One line, with nothing in it that Markdown or HTML would read."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """A name as code; it stays as it is but for what would end the code or the cell."""
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "\\|") + "`"
