"""Every file of the output that holds no weights: configuration, tokenizer, licence, card, reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from exporter import drift, shards
from exporter.adapters.adapter import Adapter
from exporter.conversion import qwen1, tiktoken_vocabulary
from exporter.drift import Drift
from exporter.outputs.card import CARD, AdapterFacts, CardFacts, Licence, licence_of, model_card
from exporter.outputs.config import architectures, json_bytes
from exporter.outputs.generation import output_generation_config
from exporter.outputs.vocabulary import ends_text
from exporter.outputs.wording import hub_id, short_name
from exporter.plan import ExportPlan
from exporter.quantization import gptq
from exporter.staging import Finished
from exporter.weights import Inputs
from loader.checkpoint import CONFIG, GENERATION_CONFIG


def files(plan: ExportPlan, finished: Mapping[str, Finished]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of each, the model card last. A name may have a folder in it."""
    assert plan.carried is not None
    generation, mended = _generation(plan)
    yield CONFIG, json_bytes(plan.config)
    if generation:
        yield GENERATION_CONFIG, json_bytes(generation)
    yield from shards.index(plan.shards).items()
    yield from _converted_tokenizer(plan).items()
    yield from ((file.name, file.read()) for file in plan.carried.files)
    drifts = drift.by_layer(c for shard in plan.shards for c in finished[shard.file].changes)
    yield from drift.report(drifts).items()
    notes = (*plan.notes, *_zero_points(plan), *plan.carried.notes, *mended)
    yield CARD, model_card(_facts(plan, finished, drifts, notes)).encode()


def _zero_points(plan: ExportPlan) -> list[str]:
    """What the weights themselves said of how they are quantized, where it is not what config.json says."""
    with Inputs() as inputs:
        note = gptq.note([recipe.trained_on or recipe.base for recipe in plan.recipes], inputs)
    return [f"The base's {note}; it was read as it is stored."] if note else []


def _generation(plan: ExportPlan) -> tuple[dict[str, Any], Sequence[str]]:
    """generation_config.json, and what was mended in it."""
    base: Mapping[str, Any] | None = plan.base.generation_config or None
    if base is not None and qwen1.is_qwen1(plan.base.config):
        base = qwen1.generation_config(base)
    assert plan.carried is not None
    tokenizer = plan.carried.tokenizer if plan.carried.is_adapters else None
    return output_generation_config(base, plan.config, ends_text(tokenizer) if tokenizer else None)


def _converted_tokenizer(plan: ExportPlan) -> dict[str, bytes]:
    """The fast tokenizer of a Qwen v1, from the last adapter that has its vocabulary, else from the base."""
    if not qwen1.is_qwen1(plan.base.config):
        return {}
    assert plan.base.path is not None
    places = [*(adapter.folder for adapter in reversed(plan.adapters)), plan.base.path]
    having = (place for place in places if (place / tiktoken_vocabulary.VOCABULARY).is_file())
    place = next(having, plan.base.path)
    return tiktoken_vocabulary.convert_vocabulary(place, [path.name for path in place.iterdir()])


# The model card


def _facts(
    plan: ExportPlan, finished: Mapping[str, Finished], drifts: Sequence[Drift], notes: Sequence[str]
) -> CardFacts:
    kept = [finished[shard.file] for shard in plan.shards]
    trained_on = [adapter.trained_on for adapter in plan.adapters]
    typed = [
        source for source in (plan.spec.original_base, plan.spec.base) if source and not Path(source).exists()
    ]
    base_model = hub_id(*typed, *trained_on)
    return CardFacts(
        base=short_name(plan.spec.base),
        adapters=tuple(_adapter_facts(adapter) for adapter in plan.adapters),
        shards=tuple(f.written for f in kept),
        shard_bytes=plan.spec.shard_bytes,
        parameters=sum(prod(recipe.shape) for recipe in plan.recipes),
        base_models=(base_model,) if base_model else (),
        revision=plan.base.revision,
        quantized=plan.method,
        original=short_name(plan.spec.original_base) if plan.spec.original_base else None,
        architecture=next(iter(architectures(plan.config)), None),
        licence=_licence(plan),
        changes=tuple(change for f in kept for change in f.changes),
        drifts=tuple(drifts),
        notes=tuple(notes),
    )


def _adapter_facts(adapter: Adapter) -> AdapterFacts:
    return AdapterFacts(short_name(adapter.source), adapter.weight, adapter.kind)


def _licence(plan: ExportPlan) -> Licence:
    assert plan.base.path is not None
    card = plan.base.path / CARD
    return licence_of(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else Licence()
