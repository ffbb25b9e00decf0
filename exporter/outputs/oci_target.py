"""The folder that `--oci` names: what may stand there, and how a new image layout takes its place.

A layout grows in .NAME.snugfit-oci beside NAME, so that NAME is a whole image at every moment but between two
renames. Whatever happens there, the next `clear` puts the old image back.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from exporter.errors import BadSpec, OutputDiffers
from exporter.writer import sync

MARK = "oci-layout"  # image-layout.md: the file that every layout has


def check_target(target: Path, out: Path) -> None:
    """Refuse a target that no image layout can be written to, before a byte of the model is.

    Raises BadSpec where it is the model's folder `out`, lies in it or around it, or is a mount point, and
    OutputDiffers where it holds anything that is no image layout, which --overwrite does not replace either.
    """
    image, model = target.resolve(), out.resolve()
    if image == model or image in model.parents or model in image.parents:
        how = "is" if image == model else "lies in" if model in image.parents else "lies around"
        beside = model.parent / f"{model.name}-image"
        raise BadSpec(f"--oci {target}: {how} the model's folder {out}. Give a folder beside it: {beside}")
    if target.is_mount():
        raise BadSpec(f"--oci {target}: is a mount point, which no image can replace: give {target}/NAME.")
    if target.exists() and not (target / MARK).is_file() and not _is_empty(target):
        raise OutputDiffers(
            f"--oci {target}: holds something that is no image layout. Give a folder that is not there yet."
        )


def refuse_another_image(target: Path) -> None:
    """Raises OutputDiffers where the target holds an image; to be asked once it is not the wanted one."""
    if target.exists() and not _is_empty(target):
        raise OutputDiffers(
            f"--oci {target}: holds another image. Give a folder that is not there yet, or --overwrite."
        )


def new_layout(target: Path) -> Path:
    """Where the layout that will be `target` is written."""
    return _staging(target) / "layout"


def publish(target: Path) -> None:
    """Give the new layout its name, in place of an older one; both are on the disk at every moment."""
    layout = new_layout(target)
    for path in (*layout.glob("*"), layout / "blobs" / "sha256", layout):
        sync(path)  # the blobs themselves are already
    if target.exists() and not _is_empty(target):
        target.rename(_old(target))
    layout.rename(target)  # onto an empty folder too, as rename(2) allows
    sync(target.parent)


def clear(target: Path) -> None:
    """Remove what a run left beside the target. An older image goes back first where none took its place."""
    old = _old(target)
    if old.exists() and (not target.exists() or _is_empty(target)):
        old.rename(target)
    shutil.rmtree(_staging(target), ignore_errors=True)


def _staging(target: Path) -> Path:
    return target.with_name(f".{target.name}.snugfit-oci")


def _old(target: Path) -> Path:
    return _staging(target) / "old"


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())
