"""What is to be exported, as the command line or a TOML file says it."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite
from pathlib import Path
from typing import Any

from exporter.errors import BadSpec
from loader.budget import SMALLEST_BARE_BYTES, parse_bytes
from loader.errors import BadBudget
from loader.usage import nearest

DEFAULT_SHARD_BYTES = 5 * 10**9
MOST_GB = 1000  # that a number without a unit can mean

_PLAIN_NUMBER = re.compile(r"\d+(\.\d+)?|\.\d+", re.ASCII)
_WEIGHT = re.compile(r"(.*):([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter as the user named it, and the factor its update is multiplied with."""

    source: str
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> AdapterRef:
        """ "DIR", "owner/name@revision" or either with ":0.5" behind it."""
        match = None if Path(text).is_dir() else _WEIGHT.fullmatch(text)
        source, weight = (match[1], float(match[2])) if match else (text, 1.0)
        if not source or not isfinite(weight) or weight == 0:
            raise BadSpec(
                f"--adapter {text}: it is ADAPTER or ADAPTER:WEIGHT, as in ./lora:0.5; a weight is not 0."
            )
        return cls(source, weight)

    def __str__(self) -> str:
        return self.source if self.weight == 1 else f"{self.source}:{self.weight:g}"


@dataclass(frozen=True)
class ExportSpec:
    """One export. Paths and hub ids are as they were typed."""

    base: str
    out: Path
    adapters: tuple[AdapterRef, ...] = ()
    original_base: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    overwrite: bool = False
    check_logits: bool = False
    oci: Path | None = None


def parse_shard_size(text: str) -> int:
    """Bytes of "1.88GB", "2GiB" or "1880000000"; a number below 1000 alone, "1.88" or "5", is in GB.

    GB is what LLaMA-Factory's export_size and the hub count in. Raises BadSpec.
    """
    try:
        return parse_bytes(_with_unit(text.strip()))
    except BadBudget:
        raise BadSpec(
            f"--shard-size {text}: is not a size. Accepted: 1.88GB, 1.88 (GB), 2GiB, 1880000000 (bytes)."
        ) from None


def _with_unit(text: str) -> str:
    if not _PLAIN_NUMBER.fullmatch(text):
        return text
    number = Fraction(text)
    if number < MOST_GB:
        return f"{text}GB"
    if number < SMALLEST_BARE_BYTES or number.denominator != 1:
        raise BadSpec(f"--shard-size {text}: bytes or gigabytes? Write {text}B or {text}GB.")
    return str(number.numerator)  # TOML's 1.88e9 is 1880000000.0


def from_toml(path: Path) -> dict[str, Any]:
    """The keys of a spec file, named as ExportSpec's fields; checked for names and types. Raises BadSpec.

    A file looks like this:

        base = "Qwen/Qwen-7B-Chat-Int4"
        adapters = ["./lora", "./style:0.5"]
        out = "./merged"
        shard_size = "1.88GB"
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise BadSpec(f"--config {path}: cannot be read: {err.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise BadSpec(f"--config {path}: is not TOML: {err}") from None
    for key, value in found.items():
        if key not in KEYS:
            raise BadSpec(f"--config {path}: {key}: no such key{nearest(key, KEYS)}")
        if not _is_of(KEYS[key], value):
            raise BadSpec(f"--config {path}: {key} = {value!r}: it is {KEYS[key]}")
    return found


# Keys of a spec file, and of `make_spec`.
KEYS: Mapping[str, str] = {
    "base": "text", "out": "text", "adapters": "a list of texts", "original_base": "text",
    "shard_size": "a size", "overwrite": "true or false", "check_logits": "true or false", "oci": "text",
}  # fmt: skip


def _is_of(kind: str, value: Any) -> bool:
    if kind == "a list of texts":
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if kind == "a size":
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    return isinstance(value, bool if kind == "true or false" else str)


def make_spec(values: Mapping[str, Any]) -> ExportSpec:
    """An ExportSpec of values by KEYS, all right in type. Raises BadSpec for what is missing or odd."""
    for name in ("base", "out"):
        if not values.get(name):
            raise BadSpec(f"--{name} is missing. {USAGE}")
    adapters = tuple(AdapterRef.parse(text) for text in values.get("adapters", ()))
    _refuse_twice(adapters)
    if values.get("original_base") and not adapters:
        raise BadSpec(
            "--original-base without --adapter: the original is already 16-bit; there is nothing to do."
        )
    return ExportSpec(
        base=values["base"],
        out=Path(values["out"]).expanduser().resolve(),  # a link's own name cannot be given to a folder
        adapters=adapters,
        original_base=values.get("original_base") or None,
        shard_bytes=parse_shard_size(str(values.get("shard_size", DEFAULT_SHARD_BYTES))),
        overwrite=values.get("overwrite", False),
        check_logits=values.get("check_logits", False),
        oci=Path(values["oci"]).expanduser().resolve() if values.get("oci") else None,
    )


USAGE = "snugfit export --base BASE [--adapter ADAPTER[:WEIGHT]] --out DIR"


def _refuse_twice(adapters: Sequence[AdapterRef]) -> None:
    places = [Path(adapter.source).resolve() for adapter in adapters]
    for adapter, place in zip(adapters, places, strict=True):
        if places.count(place) > 1:
            raise BadSpec(
                f"--adapter {adapter.source}: is there twice. Give it once, with the sum of its weights."
            )
