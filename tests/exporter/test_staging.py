"""The staging folder: what is kept of a run that was cut short, and what is thrown away."""

import subprocess
import sys

import pytest

from exporter.errors import Busy
from exporter.merge import Change
from exporter.staging import Finished, Staging, remove_leftover, staging_folder

SIZES = {"one": 3, "two": 4}
CHANGE = Change("w", 10, 5, 1.5, 0.25, None)


def finish(staging, name):
    written = staging.write(name, b"x" * SIZES[name])
    staging.record(Finished(written, (CHANGE,)))


@pytest.fixture
def out(tmp_path):
    return tmp_path / "model"


def test_nothing_is_visible_under_the_name_until_it_is_published(out):
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
        assert not out.exists()
        staging.publish()
    assert [path.name for path in out.iterdir()] == ["one"]
    assert not staging_folder(out).exists()


def test_a_second_run_of_the_same_plan_keeps_finished_shards_and_what_was_changed(out):
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
    with Staging(out, "plan", SIZES) as staging:
        assert set(staging.finished) == {"one"}
        assert staging.finished["one"].changes == (CHANGE,)
        finish(staging, "two")
        assert set(staging.finished) == {"one", "two"}


def test_a_run_of_another_plan_starts_over_and_says_so(out):
    heard: list[str] = []
    with Staging(out, "plan", SIZES, heard.append) as staging:
        finish(staging, "one")
    assert heard == []
    with Staging(out, "another", SIZES, heard.append) as staging:
        assert staging.finished == {}
        assert list(staging.folder.iterdir()) == []
    (sentence,) = heard
    assert "held the beginning of another export" in sentence


@pytest.mark.parametrize("damage", [b"xx", b"xxy", b"xxxx", None])
def test_a_shard_that_is_not_as_it_was_written_is_made_again(out, damage):
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
        finish(staging, "two")
        file = staging.folder / "one"
        file.write_bytes(damage) if damage else file.unlink()
    with Staging(out, "plan", SIZES) as staging:
        assert set(staging.finished) == {"two"}
    with Staging(out, "plan", SIZES) as staging:  # and the journal says so from then on
        assert set(staging.finished) == {"two"}


def test_a_journal_whose_last_line_was_cut_short_counts_up_to_it(out):
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
        finish(staging, "two")
    journal = staging_folder(out) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-10])
    with Staging(out, "plan", SIZES) as staging:
        assert set(staging.finished) == {"one"}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\xfe", b"[]\n", b"{}\n", b"not json", b'{"plan": "plan"}\n{"of": "another version"}\n'],
)
def test_a_journal_that_cannot_be_read_starts_over(out, content):
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
    (staging_folder(out) / "journal.jsonl").write_bytes(content)
    with Staging(out, "plan", SIZES) as staging:
        assert staging.finished == {}


def test_two_exports_never_write_into_one_folder(out):
    code = (
        "import sys; from pathlib import Path; from exporter.staging import Staging\n"
        "with Staging(Path(sys.argv[1]), 'plan', {}): print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(Busy, match="another export is writing there"), Staging(out, "plan", SIZES):
            pass
        other.stdin.close()
        other.wait()
    with Staging(out, "plan", SIZES):  # the lock went with the process
        pass


def test_publishing_takes_the_place_of_an_older_export(out):
    out.mkdir()
    (out / "old").write_bytes(b"old")
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
        staging.publish()
    assert [path.name for path in out.iterdir()] == ["one"]
    assert not staging_folder(out).exists()


def test_publishing_onto_an_empty_folder_works(out):
    out.mkdir()
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
        staging.publish()
    assert [path.name for path in out.iterdir()] == ["one"]


def test_what_a_killed_run_leaves_beside_a_finished_export_is_removed(out):
    with Staging(out, "plan", SIZES) as staging:
        finish(staging, "one")
    remove_leftover(out)
    assert not staging_folder(out).exists()
    remove_leftover(out)  # and nothing is none
