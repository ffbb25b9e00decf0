"""`snugfit verify DIR`: reads a finished export again and compares every byte with its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exporter.verify import verify
from exporter.writer import Written
from loader.budget import format_bytes
from loader.usage import Parser


def run(argv: Sequence[str]) -> int:
    """Exit code 0 when every file is as it was written, 45 when not."""
    parser = Parser(prog="snugfit verify", usage="snugfit verify DIR", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="What snugfit export wrote.")
    folder = parser.parse(argv).folder
    found = verify(folder, _print)
    total = sum(written.n_bytes for written in found.files)
    print(f"{folder}: {len(found.files)} files, {format_bytes(total)}, all as they were written")
    return 0


def _print(written: Written) -> None:
    print(f"ok  {written.sha256}  {written.file}", flush=True)
