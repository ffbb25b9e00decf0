"""Carries a plan out: shards, small files, manifest, rename."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from exporter import manifest
from exporter.destination import finished_before
from exporter.errors import BadAdapter, VerificationFailed
from exporter.fingerprint import file_sha256
from exporter.listener import Listener
from exporter.manifest import Manifest
from exporter.merge import Change, merge, same
from exporter.outputs import files as outputs
from exporter.outputs.oci import write_layout
from exporter.plan import ExportPlan
from exporter.quantization.phantoms import check_zero
from exporter.shards import OutputShard, output_bytes, output_dtype
from exporter.staging import Finished, Staging, remove_leftover
from exporter.verify import check_headers
from exporter.weights import Inputs, Weight
from exporter.writer import Writer, Written
from loader.errors import LoaderError, TiedWeightsDiffer

if TYPE_CHECKING:
    from exporter.logits.compare import LogitsReport


@dataclass(frozen=True, slots=True)
class Exported:
    """A finished export."""

    manifest: Manifest
    was_done: bool = False  # the folder held this very export already
    kept_shards: int = 0  # of an earlier run that was cut short
    logits: LogitsReport | None = None  # with --check-logits
    oci_digest: str | None = None  # with --oci: of the image's manifest


def export(plan: ExportPlan, listener: Listener | None = None) -> Exported:
    """Write the output folder of a plan, or find that it is there already.

    Raises BadSpec, OutputDiffers, Busy, BadAdapter, BadQuantization, VerificationFailed, or OSError.
    """
    listener = listener or Listener()
    done = finished_before(plan)
    if done is not None:
        remove_leftover(plan.spec.out)
        exported = Exported(done, was_done=True, logits=_check_logits(plan, plan.spec.out, listener))
    else:
        exported = _export(plan, listener)
    return replace(exported, oci_digest=_write_layout(plan, exported.manifest, listener))


def _export(plan: ExportPlan, listener: Listener) -> Exported:
    sizes = {shard.file: shard.n_bytes for shard in plan.shards}
    with Staging(plan.spec.out, plan.run_sha256, sizes, listener.say) as staging:
        kept = len(staging.finished)
        _check_leftovers(plan)
        _write_shards(plan, staging, listener)
        made = _finish(plan, staging)
        logits = _check_logits(plan, staging.folder, listener)
        finished_before(plan)  # it may have come there in the meantime, and is not to be removed then
        staging.publish()
    return Exported(made, kept_shards=kept, logits=logits)


def _finish(plan: ExportPlan, staging: Staging) -> Manifest:
    """Everything behind the last shard: proof, small files, and the manifest as the last of all."""
    changes = [change for shard in plan.shards for change in staging.finished[shard.file].changes]
    _refuse_no_effect(plan, changes)
    small = [staging.write(name, content) for name, content in outputs.files(plan, staging.finished)]
    weights = [staging.finished[shard.file].written for shard in plan.shards]
    made = Manifest(plan.sha256, plan.made_of, (*weights, *small), tuple(changes))
    staging.write(manifest.NAME, made.to_json())
    check_headers(staging.folder)
    return made


def _check_logits(plan: ExportPlan, folder: Path, listener: Listener) -> LogitsReport | None:
    """With --check-logits. Raises VerificationFailed when the folder is not base + adapter."""
    if not plan.spec.check_logits:
        return None
    from exporter.logits.compare import compare

    listener.say("comparing the merged model with base and adapter")
    with one_thread():
        found = compare(plan.recipes, folder, report=lambda layer, d: listener.say(f"{layer}: {d:.2%} apart"))
    if not found.passed:
        raise VerificationFailed(str(plan.spec.out), found.problems)
    return found


def _write_layout(plan: ExportPlan, made: Manifest, listener: Listener) -> str | None:
    if plan.spec.oci is None:
        return None
    listener.say(f"writing the image layout {plan.spec.oci}")
    described = plan.spec.out / manifest.NAME
    files = (*made.files, Written(manifest.NAME, described.stat().st_size, file_sha256(described)))
    title = {"org.opencontainers.image.title": plan.spec.out.name}
    return write_layout(plan.spec.out, plan.spec.oci, files, title, overwrite=plan.spec.overwrite)


# Weights


def _check_leftovers(plan: ExportPlan) -> None:
    """What is left out must be without effect: biases all zero, two copies of a tied matrix the same."""
    with Inputs() as inputs:
        for weight in plan.must_be_zero:
            check_zero(inputs, weight)
        for kept, copy in plan.must_be_equal:
            if not same(kept, copy, inputs):
                raise _differ(plan, kept, copy)


def _differ(plan: ExportPlan, kept: Weight, copy: Weight) -> LoaderError:
    for adapter in plan.adapters:
        if adapter.folder in (stored.folder for stored in copy.stored):
            return BadAdapter(
                adapter.source,
                f"{kept.name} and {copy.name} are for one tied matrix and hold different values: the two "
                "were trained apart, which its config does not say. Train them as one, or untie the base.",
            )
    return TiedWeightsDiffer(plan.spec.base, kept.name, copy.name)


def _write_shards(plan: ExportPlan, staging: Staging, listener: Listener) -> None:
    todo = [shard for shard in plan.shards if shard.file not in staging.finished]
    done_bytes = plan.total_bytes - sum(shard.n_bytes for shard in todo)
    with one_thread(), Inputs() as inputs, Writer(staging.folder) as writer:
        for shard in todo:
            for n_bytes in _write_shard(shard, inputs, writer, staging):
                done_bytes += n_bytes
                listener.progress(done_bytes, plan.total_bytes, shard.file)
        writer.wait()


@contextmanager
def one_thread() -> Iterator[None]:
    """A block fits one core's cache and takes less time than waking another core; that one hashes."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_shard(shard: OutputShard, inputs: Inputs, writer: Writer, staging: Staging) -> Iterator[int]:
    """Merge the shard's tensors one after the other; gives the bytes of each when it is merged."""
    from loader.shards import torch_dtype

    writer.begin(shard.file, shard.header)
    yield len(shard.header)
    changes: list[Change] = []
    for recipe in shard.recipes:
        room = partial(writer.room, dtype=torch_dtype(output_dtype(recipe)))
        change = merge(recipe, inputs, room)
        changes += [change] if change is not None else []
        yield output_bytes(recipe)
    writer.finish(lambda written: staging.record(Finished(written, tuple(changes))))


def _refuse_no_effect(plan: ExportPlan, changes: Sequence[Change]) -> None:
    """An export that came out equal to its base is a failure that nobody would notice."""
    if not plan.adapters or any(change.changed for change in changes):
        return
    folders = {adapter.folder for adapter in plan.adapters}
    if not any(stored.folder in folders for recipe in plan.recipes for stored in recipe.base.stored):
        names = ", ".join(adapter.source for adapter in plan.adapters)
        raise VerificationFailed(
            names,
            [f"not one of {len(changes)} merged tensors differs from the base: was the adapter trained?"],
        )
