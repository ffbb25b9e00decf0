"""What stands where an export is to go: nothing, this very export, another one, or somebody's own files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporter import manifest
from exporter.errors import BadSpec, OutputDiffers, VerificationFailed
from exporter.manifest import Manifest
from exporter.outputs.oci_target import check_target
from exporter.plan import ExportPlan


def refuse_bad_place(plan: ExportPlan) -> None:
    """Raise BadSpec where nothing can be published, or something that is read would be replaced."""
    out = plan.spec.out
    if out.is_mount():
        raise BadSpec(f"--out {out}: is a mount point, which cannot be replaced: give {out}/NAME.")
    if out.exists() and not out.is_dir():
        raise BadSpec(f"--out {out}: is a file. Give a folder that is not there yet.")
    for place in _inputs(plan):
        if out == place or out in place.parents:
            raise BadSpec(f"--out {out}: would replace {place}, which is read. Give another folder.")
    if plan.spec.oci is not None:
        check_target(plan.spec.oci, out)
    if _files(out) and not (out / manifest.NAME).is_file():
        raise BadSpec(
            f"--out {out}: is not empty, and no export of snugfit's. Give a folder that is not there yet."
        )


def _inputs(plan: ExportPlan) -> Iterator[Path]:
    folders = [plan.base.path, plan.original.path if plan.original else None]
    folders += [adapter.folder for adapter in plan.adapters]
    return (folder.resolve() for folder in folders if folder is not None)


def finished_before(plan: ExportPlan) -> Manifest | None:
    """The manifest of the output folder where it holds this export; None where an export may be written.

    Raises BadSpec for anything that is no export; VerificationFailed for a manifest that cannot be read; and,
    but for `overwrite`, OutputDiffers for another export and VerificationFailed for this one with files that
    are missing or cut short.
    """
    refuse_bad_place(plan)
    out, overwrite = plan.spec.out, plan.spec.overwrite
    if not _files(out):
        return None
    found = manifest.read(out)
    assert found is not None
    is_same = found.plan_sha256 == plan.sha256
    problems = damaged(out, found) if is_same else []
    if is_same and not problems:
        return found
    if overwrite:
        _refuse_strangers(out, found)
        return None
    if is_same:
        raise VerificationFailed(str(out), [*problems, "--overwrite exports it again"])
    raise OutputDiffers(
        f"{out}: holds another export ({_difference(found, plan)}). Give another --out, or --overwrite."
    )


def _files(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}


def damaged(out: Path, found: Manifest) -> list[str]:
    """By size alone: what is cheap enough for every start. `snugfit verify` looks at every byte."""
    return [
        f"{written.file}: is missing or not of the size it was written with"
        for written in found.files
        if not (out / written.file).is_file() or (out / written.file).stat().st_size != written.n_bytes
    ]


def _refuse_strangers(out: Path, found: Manifest) -> None:
    own = {written.file for written in found.files} | {manifest.NAME}
    if strangers := sorted(_files(out) - own):
        raise BadSpec(
            f"--out {out}: holds {len(strangers)} files that are not of the export there ({strangers[0]}), "
            "which --overwrite would remove. Move them first."
        )


def _difference(found: Manifest, plan: ExportPlan) -> str:
    keys = [key for key, value in plan.made_of.items() if found.made_of.get(key) != value]
    keys += [key for key in found.made_of if key not in plan.made_of]
    return "another " + ", ".join(key.replace("_", " ") for key in keys)
