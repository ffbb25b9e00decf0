"""oci.py: the OCI image layout, read with tarfile and checked against image-spec's own rules."""

import io
import json
import os
import re
import tarfile
from hashlib import sha256
from pathlib import Path

import jsonschema
import pytest

from exporter.errors import BadSpec, OutputDiffers, Stopped, VerificationFailed
from exporter.outputs import oci
from exporter.outputs.oci import layout_bytes, write_layout
from exporter.writer import Written

WEIGHTS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = ("config.json", "additional_chat_templates/rag.jinja", "名字.txt", "x" * 120 + ".txt", "empty.txt")
ANNOTATIONS = {"org.opencontainers.image.title": "merged", "org.opencontainers.image.base.name": "lab/tiny"}

# What schema/*.json of image-spec 1.1 ask of these documents.
DIGEST = {"type": "string", "pattern": "^sha256:[a-f0-9]{64}$"}
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
DESCRIPTOR = {
    "type": "object",
    "required": ["mediaType", "size", "digest"],
    "properties": {
        "mediaType": {"type": "string", "pattern": r"^[A-Za-z0-9][\w!#$&^.+-]{0,126}/[\w!#$&^.+-]{1,127}$"},
        "size": {"type": "integer", "minimum": 0},
        "digest": DIGEST,
        "annotations": TEXTS,
        "platform": {"type": "object", "required": ["architecture", "os"]},
    },
}
INDEX = {
    "type": "object",
    "required": ["schemaVersion", "manifests"],
    "properties": {"schemaVersion": {"const": 2}, "manifests": {"type": "array", "items": DESCRIPTOR}},
}
MANIFEST = {
    "type": "object",
    "required": ["schemaVersion", "config", "layers"],
    "properties": {
        "schemaVersion": {"const": 2},
        "mediaType": {"const": "application/vnd.oci.image.manifest.v1+json"},
        "config": DESCRIPTOR,
        "layers": {"type": "array", "minItems": 1, "items": DESCRIPTOR},
        "annotations": TEXTS,
    },
}
CONFIG = {
    "type": "object",
    "required": ["architecture", "os", "rootfs"],
    "properties": {
        "rootfs": {
            "type": "object",
            "required": ["diff_ids", "type"],
            "properties": {"type": {"const": "layers"}, "diff_ids": {"type": "array", "items": DIGEST}},
        },
        "history": {
            "type": "array",
            "items": {"type": "object", "properties": {"created_by": {"type": "string"}}},
        },
    },
}


@pytest.fixture
def model(tmp_path):
    """A model's folder, larger than one piece, and what was written into it."""
    folder = tmp_path / "model"
    contents = {name: os.urandom(1_500_000 + n) for n, name in enumerate(WEIGHTS)}
    contents |= {name: name.encode() for name in SMALL} | {"empty.txt": b""}
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder, [Written(n, len(c), sha256(c).hexdigest()) for n, c in contents.items()]


@pytest.fixture
def layout(model, tmp_path):
    write_layout(*model[:1], tmp_path / "image", model[1], ANNOTATIONS)
    return tmp_path / "image"


def blob(layout, descriptor):
    return (layout / "blobs" / "sha256" / descriptor["digest"].removeprefix("sha256:")).read_bytes()


def documents(layout):
    """(index, manifest, config)."""
    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads(blob(layout, index["manifests"][0]))
    return index, manifest, json.loads(blob(layout, manifest["config"]))


def layers(layout):
    """The tar files, in order."""
    return [tarfile.open(fileobj=io.BytesIO(blob(layout, d))) for d in documents(layout)[1]["layers"]]


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_its_documents_are_what_the_specification_asks_for(layout):
    for document, schema in zip(documents(layout), (INDEX, MANIFEST, CONFIG), strict=True):
        jsonschema.validate(document, schema)
    assert json.loads((layout / "oci-layout").read_bytes()) == {"imageLayoutVersion": "1.0.0"}
    index, manifest, config = documents(layout)
    assert index["manifests"][0]["annotations"] == {"org.opencontainers.image.ref.name": "latest"}
    assert {layer["mediaType"] for layer in manifest["layers"]} == {"application/vnd.oci.image.layer.v1.tar"}
    assert manifest["config"]["mediaType"] == "application/vnd.oci.image.config.v1+json"
    assert ANNOTATIONS.items() <= manifest["annotations"].items()
    assert config["rootfs"]["diff_ids"] == [layer["digest"] for layer in manifest["layers"]]
    assert len(config["history"]) == len(manifest["layers"])


def test_every_blob_is_named_by_its_hash_and_described_by_its_size(layout):
    index, manifest, _ = documents(layout)
    for path in (layout / "blobs" / "sha256").iterdir():
        assert sha256(path.read_bytes()).hexdigest() == path.name
    named = [index["manifests"][0], manifest["config"], *manifest["layers"]]
    assert {d["digest"].removeprefix("sha256:"): d["size"] for d in named} == {
        path.name: path.stat().st_size for path in (layout / "blobs" / "sha256").iterdir()
    }


def test_the_model_lies_under_models_one_weight_file_per_layer(layout, model):
    first, second, small = ([m.name for m in layer if m.isfile()] for layer in layers(layout))
    assert (first, second) == ([f"models/{WEIGHTS[0]}"], [f"models/{WEIGHTS[1]}"])
    assert sorted(small) == sorted(f"models/{name}" for name in SMALL)


def test_unpacked_it_is_the_model(layout, model, tmp_path):
    for layer in layers(layout):
        layer.extractall(tmp_path / "root", filter="data")
    assert everything(tmp_path / "root" / "models") == everything(model[0])


def test_any_user_can_read_it_and_nothing_tells_when_or_by_whom_it_was_made(layout):
    for layer in layers(layout):
        members = layer.getmembers()
        assert members[0].name == "models"
        assert members[0].isdir()
        for member in members:
            assert member.mode == (0o755 if member.isdir() else 0o644)
            owner = (member.uid, member.gid, member.uname, member.gname, member.mtime)
            assert owner == (0, 0, "", "", 0)
        assert len({member.name for member in members}) == len(members)


def test_folders_stand_before_what_lies_in_them(layout):
    names = [member.name for member in layers(layout)[-1]]
    folder = "models/additional_chat_templates"
    assert names.index("models") < names.index(folder) < names.index(f"{folder}/rag.jinja")


def test_plain_entries_need_no_extension_of_ustar(layout):
    (weights, *_, small) = (blob(layout, d) for d in documents(layout)[1]["layers"])
    assert b"PaxHeader" not in weights[:2048]
    assert small.count(b"PaxHeader") == 2  # the name in Chinese and the long one
    assert len(weights) % 512 == len(small) % 512 == 0


@pytest.mark.parametrize("n_bytes", [2**33 - 1, 2**33, 2**40])
def test_sizes_from_8_gib_on_are_readable(n_bytes):
    with tarfile.open(fileobj=io.BytesIO(oci._header("models/x", n_bytes)), mode="r:") as layer:
        member = layer.next()
    assert (member.size, member.name) == (n_bytes, "models/x")


def test_the_same_model_gives_the_same_bytes(layout, model, tmp_path):
    os.utime(model[0] / WEIGHTS[0], (1, 1))
    (model[0] / WEIGHTS[1]).chmod(0o600)
    write_layout(model[0], tmp_path / "again", model[1], dict(reversed(ANNOTATIONS.items())))
    assert everything(tmp_path / "again") == everything(layout)


def test_its_digest_is_the_manifests(model, tmp_path):
    digest = write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS)
    assert re.fullmatch("sha256:[0-9a-f]{64}", digest)
    assert digest == documents(tmp_path / "image")[0]["manifests"][0]["digest"]


def test_a_second_run_reads_no_weights(layout, model):
    before = everything(layout)
    digest = documents(layout)[0]["manifests"][0]["digest"]
    for name in WEIGHTS:
        (model[0] / name).unlink()
    assert write_layout(model[0], layout, model[1], ANNOTATIONS) == digest
    assert everything(layout) == before


def test_a_layout_that_lost_a_blob_is_not_taken_for_whole(layout, model):
    before = everything(layout)
    lost = documents(layout)[1]["layers"][0]
    (layout / "blobs" / "sha256" / lost["digest"].removeprefix("sha256:")).unlink()
    with pytest.raises(OutputDiffers, match="--overwrite"):
        write_layout(model[0], layout, model[1], ANNOTATIONS)
    write_layout(model[0], layout, model[1], ANNOTATIONS, overwrite=True)
    assert everything(layout) == before


def test_another_models_image_is_replaced_only_when_asked_to(layout, model):
    other = {**ANNOTATIONS, "org.opencontainers.image.title": "other"}
    with pytest.raises(OutputDiffers, match="another image"):
        write_layout(model[0], layout, model[1], other)
    write_layout(model[0], layout, model[1], other, overwrite=True)
    assert documents(layout)[1]["annotations"]["org.opencontainers.image.title"] == "other"
    assert sorted(path.name for path in layout.parent.iterdir()) == ["image", "model"]


def test_a_folder_that_is_no_layout_is_never_replaced(model, tmp_path):
    target = tmp_path / "image"
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputDiffers, match="no image layout"):
            write_layout(model[0], target, model[1], ANNOTATIONS, overwrite=overwrite)
    assert (target / "thesis.tex").read_text() == "years of work"
    with pytest.raises(OutputDiffers):
        write_layout(model[0], target / "thesis.tex", model[1], ANNOTATIONS)


def test_an_empty_folder_is_filled(model, tmp_path):
    (tmp_path / "image").mkdir()
    write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS)
    assert len(layers(tmp_path / "image")) == 3


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b + b"x", lambda b: b"?" + b[1:], lambda b: b""]
)
@pytest.mark.parametrize("name", [WEIGHTS[1], "config.json"])
def test_a_file_that_is_not_the_exported_one_is_refused_and_nothing_is_left(model, tmp_path, name, damage):
    path = model[0] / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(VerificationFailed, match=name):
        write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_whoever_stops_it_leaves_nothing_behind(model, tmp_path):
    def stop(n_bytes):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS, stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_run_left_is_cleared(model, tmp_path):
    left = tmp_path / ".image.snugfit-oci" / "layout" / "blobs" / "sha256"
    left.mkdir(parents=True)
    (left / "unfinished").write_bytes(b"half a layer")
    write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "model"]
    assert not (tmp_path / "image" / "blobs" / "sha256" / "unfinished").exists()


def test_progress_counts_every_byte_of_the_files(model, tmp_path):
    pieces = []
    write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS, pieces.append)
    assert sum(pieces) == sum(file.n_bytes for file in model[1])
    assert max(pieces) <= 2**20


def test_the_space_it_takes_is_known_beforehand(layout, model):
    taken = sum(len(content) for content in everything(layout).values())
    assert taken <= layout_bytes([file.n_bytes for file in model[1]]) < taken + 100_000


def test_a_model_of_very_many_shards_has_no_more_layers_than_overlayfs_stacks(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    files = []
    for n in range(271):
        name = f"model-{n:05d}-of-00271.safetensors"
        (folder / name).write_bytes(bytes([n % 256]))
        files.append(Written(name, 1, sha256(bytes([n % 256])).hexdigest()))
    write_layout(folder, tmp_path / "image", files, {})
    found = layers(tmp_path / "image")
    assert len(found) <= 100
    assert [m.name for layer in found for m in layer if m.isfile()] == [f"models/{f.file}" for f in files]


def test_a_target_that_overlaps_the_model_is_refused_before_anything_is_written(model):
    before = everything(model[0])
    for target in (model[0], model[0] / "image", model[0].parent):
        with pytest.raises(BadSpec, match="model-image"):
            write_layout(model[0], target, model[1], ANNOTATIONS, overwrite=True)
    assert everything(model[0].parent) == {f"model/{name}": content for name, content in before.items()}


@pytest.mark.parametrize("error", [OSError, Stopped, KeyboardInterrupt])
def test_an_image_that_could_not_be_replaced_is_still_there(layout, model, monkeypatch, error):
    before = everything(layout)
    rename = Path.rename

    def failing(path, target):
        if path.name == "layout":
            raise error("between the two renames")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        write_layout(model[0], layout, model[1], {}, overwrite=True)
    assert everything(layout) == before
    assert sorted(path.name for path in layout.parent.iterdir()) == ["image", "model"]


def test_an_image_that_a_killed_run_had_moved_away_is_put_back(layout, model):
    before = everything(layout)
    staging = layout.with_name(".image.snugfit-oci")
    staging.mkdir()
    layout.rename(staging / "old")
    with pytest.raises(OutputDiffers, match="another image"):
        write_layout(model[0], layout, model[1], {})
    assert everything(layout) == before
    assert not staging.exists()


def test_all_of_an_image_is_on_the_disk_before_it_gets_its_name(model, tmp_path, monkeypatch):
    """Every file and folder of it was synced before the rename, and the parent after it."""
    synced, renamed = [], []
    fsync, rename = os.fsync, Path.rename

    def noted(descriptor):
        status = os.fstat(descriptor)
        synced.append(status.st_ino)
        fsync(descriptor)

    def noted_rename(path, target):
        if path.name == "layout":
            renamed.append({entry: entry.stat().st_ino for entry in (path, *path.rglob("*"))})
            assert set(renamed[0].values()) <= set(synced)
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", noted_rename)
    write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS)
    assert len(renamed[0]) == 1 + 2 + 2 + len(list((tmp_path / "image/blobs/sha256").iterdir()))
    assert synced[-1] == tmp_path.stat().st_ino


def test_a_target_that_is_a_link_is_filled_where_it_points_to(model, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "image").symlink_to(tmp_path / "disk" / "image")
    write_layout(model[0], tmp_path / "image", model[1], ANNOTATIONS)
    assert (tmp_path / "image").is_symlink()
    assert len(layers(tmp_path / "disk" / "image")) == 3
