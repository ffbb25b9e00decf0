"""What stands where an export is to go is told apart, and never removed by mistake."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from exporter import manifest
from exporter.destination import finished_before, refuse_bad_place
from exporter.errors import BadSpec, OutputDiffers, VerificationFailed
from exporter.export import export
from exporter.plan import make_plan
from exporter.spec import ExportSpec

DEMO = Path(__file__).resolve().parents[2] / "service" / "demo"


@pytest.fixture
def spec(tmp_path):
    return ExportSpec(str(DEMO), tmp_path / "out", shard_bytes=10**9)


@pytest.fixture
def done(spec):
    """The spec of an export that is there."""
    export(make_plan(spec))
    return spec


def test_nothing_and_an_empty_folder_are_free(spec):
    assert finished_before(make_plan(spec)) is None
    spec.out.mkdir()
    assert finished_before(make_plan(spec)) is None


def test_this_very_export_is_found(done):
    assert finished_before(make_plan(done)).plan_sha256 == make_plan(done).sha256


def test_another_export_is_not_overwritten_unasked(done):
    other = replace(done, shard_bytes=1_880_000)
    with pytest.raises(OutputDiffers, match="another shard bytes") as refused:
        finished_before(make_plan(other))
    assert refused.value.exit_code == 44
    other = replace(other, overwrite=True)
    export(make_plan(other))
    assert len(list(done.out.glob("model-*"))) == 4
    assert not (done.out / "model.safetensors").exists()


def test_overwriting_never_removes_what_is_not_of_the_export(done):
    (done.out / "thesis.txt").write_text("years of work")
    with pytest.raises(BadSpec, match=r"holds 1 files that are not of the export there \(thesis.txt\)"):
        finished_before(make_plan(replace(done, shard_bytes=1_880_000, overwrite=True)))


def test_a_finished_export_that_was_damaged_is_told_and_made_again_on_demand(done):
    os.truncate(done.out / "model.safetensors", 100)
    (done.out / "tokenizer.json").unlink()
    with pytest.raises(
        VerificationFailed, match=r"model\.safetensors: is missing or not of the size"
    ) as failed:
        finished_before(make_plan(done))
    assert "tokenizer.json: is missing" in str(failed.value)
    assert not export(make_plan(replace(done, overwrite=True))).was_done
    assert finished_before(make_plan(done)) is not None


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(spec, overwrite):
    spec.out.mkdir()
    (spec.out / "thesis.txt").write_text("years of work")
    with pytest.raises(BadSpec, match=r"is not empty, and no export of snugfit's"):
        refuse_bad_place(make_plan(replace(spec, overwrite=overwrite)))


def test_what_is_read_is_never_replaced(done, tmp_path):
    for base, out in ((done.out, done.out), (done.out, tmp_path)):
        with pytest.raises(BadSpec, match="which is read"):
            refuse_bad_place(make_plan(ExportSpec(str(base), out, overwrite=True)))
    refuse_bad_place(make_plan(ExportSpec(str(done.out), done.out / "again")))


def test_a_mount_point_or_a_file_cannot_be_the_output(spec, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BadSpec, match="is a file"):
        refuse_bad_place(make_plan(replace(spec, out=tmp_path / "file")))
    with pytest.raises(BadSpec, match="is a mount point"):
        refuse_bad_place(make_plan(replace(spec, out=Path("/proc"))))


def test_a_manifest_that_cannot_be_read_is_told(done):
    (done.out / manifest.NAME).write_text("{}")
    with pytest.raises(VerificationFailed, match="is damaged"):
        finished_before(make_plan(done))
