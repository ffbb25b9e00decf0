"""What an export says about itself: its plan before, its result after; for people and for programs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from exporter import drift
from exporter.manifest import norm, short
from exporter.outputs.config import architectures
from exporter.plan import ExportPlan
from exporter.room import peak_bytes
from loader.budget import format_bytes

if TYPE_CHECKING:
    from exporter.export import Exported

SHOWN_SHARDS = 3


def plan_lines(plan: ExportPlan) -> list[str]:
    """The plan as aligned lines."""
    facts = list(_facts(plan))
    width = max(len(name) for name, _ in facts)
    return [f"{name:<{width}}  {sentence}" for name, sentence in facts]


def _facts(plan: ExportPlan) -> Iterator[tuple[str, str]]:
    yield "base", f"{plan.spec.base} ({plan.method or _dtypes(plan)})"
    if plan.spec.original_base:
        yield "merge onto", plan.spec.original_base
    for adapter in plan.adapters:
        weight = "" if adapter.weight == 1 else f", times {adapter.weight:g}"
        yield "adapter", f"{adapter.source}: {len(adapter.tensors)} tensors, each with its place{weight}"
    recipes = plan.recipes
    touched = sum(bool(recipe.updates) for recipe in recipes)
    yield "tensors", f"{len(recipes)}, of which {touched} are merged"
    yield "as", ", ".join(architectures(plan.config)) or "no architecture that config.json names"
    yield "shards", _shards(plan)
    yield "memory", f"at most {format_bytes(peak_bytes(plan), binary=True)}"
    yield "out", str(plan.spec.out)
    yield from (("note", note) for note in plan.notes)


def _shards(plan: ExportPlan) -> str:
    sizes = [f"{shard.file} {format_bytes(shard.n_bytes)}" for shard in plan.shards[:SHOWN_SHARDS]]
    more = f", and {len(plan.shards) - SHOWN_SHARDS} more" if len(plan.shards) > SHOWN_SHARDS else ""
    return f"{len(plan.shards)}, {format_bytes(plan.total_bytes)} in bf16: {', '.join(sizes)}{more}"


def _dtypes(plan: ExportPlan) -> str:
    return ", ".join(sorted({tensor.dtype.lower() for tensor in plan.base.tensors}))


def plan_json(plan: ExportPlan) -> dict[str, Any]:
    return {
        "base": plan.spec.base,
        "original_base": plan.spec.original_base,
        "quantized": plan.method,
        "adapters": [
            {"source": a.source, "weight": a.weight, "tensors": len(a.tensors)} for a in plan.adapters
        ],
        "architectures": architectures(plan.config),
        "out": str(plan.spec.out),
        "tensors": len(plan.recipes),
        "merged_tensors": sum(bool(recipe.updates) for recipe in plan.recipes),
        "total_bytes": plan.total_bytes,
        "peak_bytes": peak_bytes(plan),
        "shards": [{"file": s.file, "bytes": s.n_bytes, "tensors": len(s.recipes)} for s in plan.shards],
        "notes": list(plan.notes),
    }


def summary(plan: ExportPlan, done: Exported) -> list[str]:
    """What was written and what merging changed."""
    return list(_sentences(plan, done))


def _sentences(plan: ExportPlan, done: Exported) -> Iterator[str]:
    if done.kept_shards:
        yield f"{done.kept_shards} shards of an earlier run were whole and are kept"
    if not done.was_done:
        yield from _changed(done)
    if warning := drift.warning(drift.by_layer(done.manifest.changes)):
        yield warning
    if done.logits is not None:
        yield from done.logits.sentences()
    if done.oci_digest is not None:
        yield f"{plan.spec.oci}: an image layout, {done.oci_digest}"
    if done.was_done:
        yield f"{plan.spec.out}: already done, nothing to do (snugfit verify checks every byte)"
    else:
        total = sum(written.n_bytes for written in done.manifest.files)
        yield f"{plan.spec.out}: {len(done.manifest.files)} files, {format_bytes(total)}"


def _changed(done: Exported) -> Iterable[str]:
    changes = done.manifest.changes
    if not changes:
        return
    changed, elements = sum(c.changed for c in changes), sum(c.elements for c in changes)
    update, base = norm([c.update_norm for c in changes]), norm([c.base_norm for c in changes])
    yield (
        f"merged {len(changes)} tensors: {changed:,} of {elements:,} elements differ from the base "
        f"({changed / max(elements, 1):.1%}); the update's norm is {update:.4g}, the base's {base:.4g}"
    )
    if untouched := [c.name for c in changes if not c.changed]:
        yield f"{len(untouched)} of them came out equal to the base: {', '.join(untouched[:3])}"


def summary_json(plan: ExportPlan, done: Exported) -> dict[str, Any]:
    changes = done.manifest.changes
    return {
        "out": str(plan.spec.out),
        "already_done": done.was_done,
        "kept_shards": done.kept_shards,
        "merged_tensors": len(changes),
        "changed_elements": sum(c.changed for c in changes),
        "update_norm": short(norm([c.update_norm for c in changes])),
        "logits": done.logits.to_json() if done.logits is not None else None,
        "oci_digest": done.oci_digest,
        "files": {f.file: {"bytes": f.n_bytes, "sha256": f.sha256} for f in done.manifest.files},
    }
