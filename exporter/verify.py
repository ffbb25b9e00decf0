"""`snugfit verify`: reads a finished export again and compares every byte of it with its manifest."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exporter import manifest
from exporter.errors import VerificationFailed
from exporter.fingerprint import problem
from exporter.manifest import Manifest
from exporter.staging import HASHING_THREADS
from exporter.writer import Written
from loader import checkpoint
from loader.errors import BadCheckpoint, NotAModel


def verify(folder: Path, report: Callable[[Written], None] = lambda _: None) -> Manifest:
    """Check size and sha256 of every file, that no other weight file is there, and headers against the index.

    `report` hears of every file that is as it was written. Raises NotAModel where there is no export, and
    VerificationFailed, which names every file that is amiss.
    """
    if not folder.is_dir():
        raise NotAModel(str(folder), "there is no such folder.")
    found = manifest.read(folder)
    if found is None:
        raise NotAModel(
            str(folder),
            f"there is no {manifest.NAME}: it was not written by snugfit export, or not to its end.",
        )
    problems = [*_strangers(folder, found), *_damaged(folder, found, report)]
    if problems:
        raise VerificationFailed(str(folder), problems)
    check_headers(folder)
    return found


def check_headers(folder: Path) -> None:
    """Headers, index and config as any loader reads them. Raises VerificationFailed."""
    try:
        checkpoint.read_any(folder)
    except BadCheckpoint as err:
        raise VerificationFailed(str(folder), [str(err)]) from None


def _strangers(folder: Path, found: Manifest) -> list[str]:
    """Weight files of some other export: a loader without an index would read them too."""
    known = {written.file for written in found.files}
    return [
        f"{path.name}: is not of this export"
        for path in sorted(folder.glob("*.safetensors"))
        if path.name not in known
    ]


def _damaged(folder: Path, found: Manifest, report: Callable[[Written], None]) -> list[str]:
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        checked = pool.map(lambda written: problem(folder, written), found.files)
        problems = []
        for written, sentence in zip(found.files, checked, strict=True):
            if sentence:
                problems.append(sentence)
            else:
                report(written)
        return problems
