"""Whether disk and memory are enough, before a weight is read."""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter.errors import DoesNotFit
from exporter.outputs.oci import layout_bytes
from exporter.plan import ExportPlan
from exporter.recipe import Recipe
from exporter.staging import staging_folder
from exporter.writer import BUFFER_BYTES, BUFFERS
from loader import probe
from loader.budget import format_bytes

# Python, torch and safetensors headers, as measured with torch 2.13 (220 MiB), with room for another build.
PROCESS_BYTES = 300 * 2**20
# What a dequantizer holds: packed columns, their transpose, scales.
DEQUANTIZER_BYTES = 128 * 2**20
# With transformers imported too, as measured with 5.23, after a merge in the same process.
CHECK_BYTES = 600 * 2**20
CHECK_TOKENS = 3 * 4 * 31  # three variants of four prompts
# Tokenizer, card, manifest.
SMALL_FILES_BYTES = 64 * 2**20


def check_room(plan: ExportPlan) -> None:
    """Raise DoesNotFit where the disk or the memory limit of this machine or container is too small."""
    _check_disk(plan)
    need, have = peak_bytes(plan), probe.machine().ram_total_bytes
    if need > have:
        raise DoesNotFit("memory", need, have, "Give the container a limit of 1GiB.")


def peak_bytes(plan: ExportPlan) -> int:
    """An upper bound of the memory that the export takes; the model's size is not in it."""
    quantized = DEQUANTIZER_BYTES if plan.method else 0
    updates = max((_update_bytes(recipe) for recipe in plan.recipes), default=0)
    logits = _logits_bytes(plan) if plan.spec.check_logits else 0
    return max(PROCESS_BYTES + BUFFER_BYTES * BUFFERS + quantized + updates, logits)


def _logits_bytes(plan: ExportPlan) -> int:
    """Of --check-logits, which comes after merging: transformers, and fp32 activations of a few prompts."""
    widths = (plan.config.get("intermediate_size") or 0, plan.config.get("hidden_size") or 0)
    return CHECK_BYTES + CHECK_TOKENS * 4 * (3 * widths[0] + 6 * widths[1])


def _update_bytes(recipe: Recipe) -> int:
    """An adapter's matrices for one tensor, as stored and in fp32."""
    return sum(3 * 4 * tensor.n_elements for update in recipe.updates for tensor in update.stored)


def _check_disk(plan: ExportPlan) -> None:
    """Disk by disk: the model and its image layout may be on the same."""
    targets = [(plan.spec.out, plan.total_bytes)]
    if plan.spec.oci is not None:
        targets.append((plan.spec.oci, layout_bytes([shard.n_bytes for shard in plan.shards])))
    needs: dict[int, tuple[Path, int]] = {}
    for target, n_bytes in targets:
        place = _existing(target.absolute().parent)
        device = place.stat().st_dev
        needs[device] = (place, needs.get(device, (place, 0))[1] + n_bytes + SMALL_FILES_BYTES)
    for place, need_bytes in needs.values():
        have_bytes = shutil.disk_usage(place).free + _staged_bytes(plan.spec.out, place)
        if need_bytes > have_bytes:
            hint = f"Free {format_bytes(need_bytes - have_bytes)} there, or write elsewhere."
            raise DoesNotFit(f"the disk of {place}", need_bytes, have_bytes, hint)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return folder if folder.exists() else _existing(folder.parent)


def _staged_bytes(out: Path, place: Path) -> int:
    """What an earlier run has written to this disk already: it is used again or goes away."""
    stats = [path.stat() for path in staging_folder(out).rglob("*.safetensors")]
    return sum(stat.st_size for stat in stats if stat.st_dev == place.stat().st_dev)
