"""A quantized weight's parts: several tensors in the file that stand for one of the model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from exporter.errors import BadQuantization, NeedsDownload
from exporter.weights import Stored, Weight

# What calibration leaves behind for activations and the KV cache. Numbers of a 16-bit model do not need it.
ACTIVATION_SUFFIXES = tuple(
    f"{part}_{kind}"
    for part in (".input", ".output", ".act", ".activation", ".q", ".k", ".v", ".kv")
    for kind in ("scale", "zero_point", "global_scale", "scale_ub")
)


def part(source: str, named: Mapping[str, Stored], name: str, of: str) -> Stored:
    """The tensor of this name, or BadQuantization: the weight `of` cannot be read without it."""
    if name not in named:
        raise BadQuantization(
            source,
            f"{of} is quantized, and there is no {name} to read it by. The checkpoint is incomplete, or of a "
            "format that config.json does not name.",
        )
    return named[name]


def refuse_leftovers(
    source: str, tensors: Iterable[Stored], weights: Sequence[Weight], suffixes: Collection[str]
) -> None:
    """Raise BadQuantization for a scale, a zero point or the like (by its name) that belongs to no weight."""
    used = {stored.name for weight in weights for stored in weight.stored}
    for tensor in tensors:
        if tensor.name not in used and tensor.name.endswith(tuple(suffixes)):
            raise BadQuantization(
                source,
                f"{tensor.name} belongs to no weight: its weight is missing, or quantized in another way "
                "than config.json says.",
            )


def read_now(source: str, stored: Stored, limit_bytes: int) -> bytes:
    """A tensor of a few bytes, while planning; little-endian, as safetensors has it.

    Raises NeedsDownload for one whose file is on the hub, and BadQuantization for one that is longer.
    """
    if stored.folder is None:
        raise NeedsDownload(
            source,
            f"the shapes of its weights stand inside the files ({stored.name}), not in their headers. "
            "Download the model first and give its folder as --base.",
        )
    if stored.info.n_bytes > limit_bytes:
        raise BadQuantization(
            source,
            f"{stored.name} has {stored.info.n_bytes:,} bytes, where at most {limit_bytes:,} make sense.",
        )
    with (stored.folder / stored.info.file).open("rb") as stream:
        stream.seek(stored.info.start)
        return stream.read(stored.info.n_bytes)
