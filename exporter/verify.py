"""`snugfit verify`: reads a finished export again and compares every byte of it with its manifest."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from exporter import manifest
from exporter.errors import VerificationFailed
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
        problems = pool.map(lambda written: _problem(folder, written), found.files)
        found_problems = []
        for written, problem in zip(found.files, problems, strict=True):
            if problem:
                found_problems.append(problem)
            else:
                report(written)
        return found_problems


def _problem(folder: Path, written: Written) -> str:
    from exporter.fingerprint import file_sha256

    path = folder / written.file
    if not path.is_file():
        return f"{written.file}: is missing"
    if (size := path.stat().st_size) != written.n_bytes:
        return f"{written.file}: has {size:,} bytes, and {written.n_bytes:,} were written"
    if (sha256 := file_sha256(path)) != written.sha256:
        return f"{written.file}: its sha256 is {sha256[:16]}…, and {written.sha256[:16]}… was written"
    return ""
