"""Tools are fetched once; what cannot be had is said and not an error."""

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
