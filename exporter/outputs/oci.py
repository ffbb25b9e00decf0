"""`--oci`: the model as an OCI image layout, a folder that registries' clients push as a container image.

Format: OCI image-spec 1.0 (image-layout.md, manifest.md, config.md, layer.md). The model lies under /models,
as in a KServe ModelCar, with a layer for every weight file, so that a node fetches them side by side and
keeps those that it has. There is no program in the image. That is enough where Kubernetes (>= 1.33) mounts it
as an image volume, as KServe >= 0.20 does for `oci+native://IMAGE`. The older way of KServe, a sidecar for
`oci://IMAGE`, runs `sh` and `ln` out of the image: give it one that is built from

    FROM busybox
    COPY --from=IMAGE /models /models

Push it with `skopeo copy --preserve-digests oci:DIR:latest docker://IMAGE`: without that flag every layer is
compressed on the way, which takes long and changes its digest.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from exporter.errors import VerificationFailed
from exporter.outputs.oci_target import check_target, clear, new_layout, publish, refuse_another_image
from exporter.writer import SYNC_BYTES, Written

ROOT = "models"
TAG = "latest"
# Of all weight and small files together, so that a changed tag or a second run is told from another model.
MODEL_SHA256 = "snugfit.model.sha256"

_LAYOUT = {"imageLayoutVersion": "1.0.0"}
_PLATFORM = {"architecture": "amd64", "os": "linux"}  # said because it has to be: nothing in it runs
_INDEX, _MANIFEST, _CONFIG, _LAYER = (
    f"application/vnd.oci.image.{kind}"
    for kind in ("index.v1+json", "manifest.v1+json", "config.v1+json", "layer.v1.tar")
)
_CREATED = {"created": "1970-01-01T00:00:00Z"}  # the same every time; without one, `umoci stat` crashes
_MAX_LAYERS = 100  # overlayfs of common runtimes stacks 127
_PIECE_BYTES = 2**20
_BLOCK_BYTES = 512  # of a tar file
_END = bytes(2 * _BLOCK_BYTES)

# Bytes that were copied since the last call; may raise to stop.
Report = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class _Blob:
    digest: str
    n_bytes: int

    def descriptor(self, media_type: str) -> dict[str, Any]:
        return {"mediaType": media_type, "digest": self.digest, "size": self.n_bytes}


def layout_bytes(sizes: Sequence[int]) -> int:
    """Disk space that a layout of files of these sizes takes at most."""
    return sum(sizes) + 8 * _BLOCK_BYTES * (len(sizes) + 16)


def write_layout(
    model_folder: Path,
    target: Path,
    files: Sequence[Written],
    annotations: Mapping[str, str],
    report: Report = lambda _: None,
    overwrite: bool = False,
) -> str:
    """Write `files` of a model's folder as an image layout; gives the digest of its manifest ("sha256:…").

    The same files and annotations give the same bytes; where `target` holds them already, nothing is written.
    It is written beside `target` and renamed; an image that stood there is there until then, and again where
    the rename fails. Bytes are copied: in a layer, a file stands behind a header and
    the layer's digest is over both, so a hard link to the file cannot be a layer. Each file is hashed on the
    way. Raises what check_target does, OutputDiffers where `target` holds another image and `overwrite` is
    false, VerificationFailed where a file is not what `files` says, or OSError of the disk.
    """
    identity = _identity(files, annotations)
    check_target(target, model_folder)
    target = target.resolve()
    clear(target)
    if (digest := _finished(target, identity)) is not None:
        return digest
    if not overwrite:
        refuse_another_image(target)
    layout = new_layout(target)
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True)
    try:
        groups = list(_groups(files))
        layers = [_write_layer(blobs, model_folder, group, report) for group in groups]
        manifest = _write_manifest(blobs, groups, layers, {**annotations, MODEL_SHA256: identity})
        _write_index(layout, manifest)
        publish(target)
    finally:
        clear(target)
    return manifest.digest


def _groups(files: Sequence[Written]) -> Iterator[Sequence[Written]]:
    """The files of each layer: weight files one by one, as far as there may be so many; then all others."""
    weights = [file for file in files if file.file.endswith(".safetensors")]
    small = sorted((file for file in files if file not in weights), key=lambda file: file.file)
    step = -(-len(weights) // _MAX_LAYERS) or 1
    yield from (weights[start : start + step] for start in range(0, len(weights), step))
    if small:
        yield small


# A layer


def _write_layer(blobs: Path, model_folder: Path, files: Sequence[Written], report: Report) -> _Blob:
    with _Hashed(blobs) as layer:
        for folder in _folders(files):
            layer.write(_header(folder, 0, is_folder=True))
        for file in files:
            layer.write(_header(f"{ROOT}/{file.file}", file.n_bytes))
            _copy(model_folder / file.file, file, layer, report)
            layer.write(bytes(-file.n_bytes % _BLOCK_BYTES))
        layer.write(_END)
        return layer.finish()


def _folders(files: Sequence[Written]) -> list[str]:
    paths = [PurePosixPath(ROOT, file.file) for file in files]
    return sorted({str(parent) for path in paths for parent in list(path.parents)[:-1]})


def _header(name: str, n_bytes: int, is_folder: bool = False) -> bytes:
    """ustar, with PAX records for what that cannot say: 8 GiB and more, long names, letters beyond ASCII."""
    entry = tarfile.TarInfo(name)
    entry.size = n_bytes
    entry.type = tarfile.DIRTYPE if is_folder else tarfile.REGTYPE
    entry.mode = 0o755 if is_folder else 0o644  # whichever user a container runs as
    return entry.tobuf(tarfile.PAX_FORMAT)


def _copy(source: Path, file: Written, layer: _Hashed, report: Report) -> None:
    """Copy and compare. A file that is longer than it was is cut, and told by its hash."""
    own, left = sha256(), file.n_bytes
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with source.open("rb", buffering=0) as stream:
        while left:
            piece = buffer[: stream.readinto(buffer[: min(left, _PIECE_BYTES)]) or 0]
            if not piece:
                break
            own.update(piece)
            layer.write(piece)
            left -= len(piece)
            report(len(piece))
        is_longer = bool(stream.read(1))
    if left or is_longer or own.hexdigest() != file.sha256:
        reason = (
            f"{file.file}: is not the {file.n_bytes:,} bytes with sha256 {file.sha256[:16]}… of the export"
        )
        raise VerificationFailed(str(source.parent), [f"{reason}. Export again"])


class _Hashed:
    """A blob that is being written: it gets its name, which is its hash, at the end."""

    def __init__(self, blobs: Path) -> None:
        self._path = blobs / "unfinished"
        self._stream: BinaryIO
        self._sha256 = sha256()
        self._n_bytes = self._unsynced_bytes = 0

    def write(self, content: bytes | memoryview) -> None:
        self._sha256.update(content)
        self._stream.write(content)
        self._n_bytes += len(content)
        self._unsynced_bytes += len(content)
        if self._unsynced_bytes >= SYNC_BYTES:
            self._sync()

    def finish(self) -> _Blob:
        self._sync()
        name = self._sha256.hexdigest()
        self._path.rename(self._path.with_name(name))
        return _Blob(f"sha256:{name}", self._n_bytes)

    def _sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._unsynced_bytes = 0

    def __enter__(self) -> _Hashed:
        self._stream = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


# What describes the layers


def _write_manifest(
    blobs: Path, groups: Sequence[Sequence[Written]], layers: Sequence[_Blob], annotations: Mapping[str, str]
) -> _Blob:
    config = {
        **_CREATED,
        **_PLATFORM,
        "config": {},
        # Uncompressed layers: the hash of the tar file and of the blob are one.
        "rootfs": {"type": "layers", "diff_ids": [layer.digest for layer in layers]},
        "history": [{**_CREATED, "created_by": f"snugfit export: {_described(group)}"} for group in groups],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": _MANIFEST,
        "config": _write_json(blobs, config).descriptor(_CONFIG),
        "layers": [layer.descriptor(_LAYER) for layer in layers],
        "annotations": dict(sorted(annotations.items())),
    }
    return _write_json(blobs, manifest)


def _described(group: Sequence[Written]) -> str:
    more = f" and {len(group) - 1} more" if len(group) > 1 else ""
    return f"/{ROOT}/{group[0].file}{more}"


def _write_json(blobs: Path, content: Mapping[str, Any]) -> _Blob:
    with _Hashed(blobs) as blob:
        blob.write(_json(content))
        return blob.finish()


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def _write_index(layout: Path, manifest: _Blob) -> None:
    named = {
        **manifest.descriptor(_MANIFEST),
        "platform": _PLATFORM,
        "annotations": {"org.opencontainers.image.ref.name": TAG},
    }
    (layout / "oci-layout").write_bytes(_json(_LAYOUT))
    index = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": [named]}
    (layout / "index.json").write_bytes(_json(index))


# The target


def _identity(files: Sequence[Written], annotations: Mapping[str, str]) -> str:
    content = [sorted((f.file, f.n_bytes, f.sha256) for f in files), sorted(annotations.items())]
    return sha256(json.dumps(content).encode()).hexdigest()


def _finished(target: Path, identity: str) -> str | None:
    """The manifest's digest, where the target is a whole layout of just these files."""
    try:
        (named,) = json.loads((target / "index.json").read_bytes())["manifests"]
        manifest = json.loads(_blob(target, named["digest"]).read_bytes())
        parts = [manifest["config"], *manifest["layers"]]
        is_whole = all(_blob(target, part["digest"]).stat().st_size == part["size"] for part in parts)
        is_same = manifest["annotations"][MODEL_SHA256] == identity
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return str(named["digest"]) if is_whole and is_same else None


def _blob(target: Path, digest: str) -> Path:
    return target / "blobs" / "sha256" / digest.removeprefix("sha256:")
