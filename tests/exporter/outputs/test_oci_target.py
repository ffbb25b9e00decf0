"""oci_target.py: what `--oci` may name, asked before an export starts."""

import pytest

from exporter.errors import BadSpec, OutputDiffers
from exporter.outputs.oci_target import check_target


@pytest.mark.parametrize(
    ("target", "how"),
    [("out", " is"), ("x/../out", " is"), ("out/image", " lies in"), (".", " lies around"), ("link", " is")],
)
def test_a_target_that_overlaps_the_model_is_refused_though_neither_is_there(
    tmp_path, monkeypatch, target, how
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("out")
    with pytest.raises(BadSpec, match=f"{how} the model's folder .*out-image"):
        check_target(tmp_path / target, (tmp_path / "out").relative_to(tmp_path))


def test_a_folder_beside_the_model_is_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "oci-layout").write_text("{}")
    for target in ("empty", "image", "new", "out-image", "deep/new"):
        check_target(tmp_path / target, tmp_path / "out")


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    for target in ("thesis", "thesis/thesis.tex"):
        with pytest.raises(OutputDiffers, match="no image layout"):
            check_target(tmp_path / target, tmp_path / "out")


def test_a_mount_point_is_refused_with_a_folder_in_it_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.is_mount", lambda path: path.name == "volume")
    with pytest.raises(BadSpec, match="volume/NAME"):
        check_target(tmp_path / "volume", tmp_path / "out")
