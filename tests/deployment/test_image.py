"""The Dockerfile against what it must agree with, and the parts of `make image` that need no image."""

from __future__ import annotations

import re
import shlex
import tomllib

import pytest

from deployment import ROOT, image
from deployment.images import build, network
from deployment.outcome import Skipped, need, told

DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.removeprefix(f"{name} ") for line in joined.splitlines() if line.startswith(f"{name} ")]


def copied_from_the_context() -> set[str]:
    lines = [shlex.split(line) for line in instructions("COPY") if "--from" not in line]
    return {source for line in lines for source in line[:-1]}


def test_every_package_of_the_wheel_is_let_through_and_copied():
    packages = {
        pattern.rstrip("*") for pattern in PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    }
    assert packages <= set(build.let_through())
    assert packages <= copied_from_the_context()


def test_what_is_let_through_is_what_is_copied():
    whole = {source for source in copied_from_the_context() if "*" not in source}
    assert whole == set(build.let_through())


def test_the_kernels_are_compiled_from_all_of_their_sources():
    module = PYPROJECT["tool"]["setuptools"]["ext-modules"][0]
    patterns = [source for source in copied_from_the_context() if "*" in source]
    found = {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    assert {*module["sources"], *module["depends"]} <= found


def test_torch_is_the_tested_version_and_for_the_cpu_unless_told_otherwise():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (pin,) = (line.removeprefix("torch==") for line in constraints if line.startswith("torch=="))
    assert f"ARG TORCH={pin}+cpu\n" in DOCKERFILE


def test_exactly_that_build_of_torch_is_installed_and_no_other_of_its_version():
    """PEP 440: "==2.13.0" takes a 2.13.0+cpu; "===" compares the text."""
    named = re.findall(r'"(torch=+)\$TORCH"', DOCKERFILE)
    assert named == ["torch===", "torch==="]


def test_everything_from_an_index_is_constrained():
    installs = [run for run in instructions("RUN") if "pip install" in run and "--no-index" not in run]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in run for run in installs)


def test_the_dockerfile_names_no_host():
    assert "://" not in DOCKERFILE
    assert re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) == [
        "scratch", *["${BASE_IMAGE}"] * 3, "runtime", "runtime",
    ]  # fmt: skip


def test_no_shell_stands_between_the_signal_and_the_program():
    assert all(line.startswith('["tini", "--", ') for line in instructions("ENTRYPOINT"))
    assert instructions("USER") == ["10001:10001"]


def test_hadolint_has_nothing_to_say():
    try:
        assert image._hadolint() == "no warning"
    except Skipped as err:
        pytest.skip(str(err))


def test_a_variable_wins_over_a_file_in_what_pip_is_told():
    listed = ":env:.timeout='180'\nglobal.timeout='60'\nuser.find-links='a b'\n"
    assert network.parse(listed) == {"timeout": "180", "find-links": "a b"}


def test_a_build_gets_addresses_and_not_what_lies_on_this_disk(tmp_path):
    settings = {
        "index-url": "https://index.example/simple",
        "extra-index-url": "file:///mirror https://more.example/simple",
        "find-links": f"/nowhere {tmp_path}",
        "constraint": "/some/constraints.txt",
        "cert": "/some/ca.pem",
    }
    assert network.pip_conf(settings).splitlines() == [
        "[global]",
        "index-url = https://index.example/simple",
        "extra-index-url = https://more.example/simple",
        f"cert = {network.CERTIFICATES}",
    ]
    assert network.wheel_folder(settings) == tmp_path


def test_a_machine_with_nothing_set_passes_nothing_on():
    assert network.pip_conf({}) == "[global]\n"
    assert network.wheel_folder({}) is None


@pytest.mark.parametrize(
    ("history", "line"),
    [
        ("/bin/sh -c #(nop) COPY dir:92ff in /opt", "COPY dir:92ff in /opt"),
        (
            "|1 TORCH=2 /bin/sh -c --mount=type=bind,from=w,target=/wheels     pip install x",
            "RUN pip install x",
        ),
        ("/bin/sh -c python3 -m venv .", "RUN python3 -m venv ."),
    ],
)
def test_a_layer_is_told_by_its_instruction(history, line):
    assert build.instruction(history) == line


def test_a_failed_and_a_skipped_step_are_told_apart_from_one_that_passed():
    def skipped() -> str:
        raise Skipped("no tool")

    def failed() -> str:
        need(False, "wrong")
        return "never"

    assert told("a", lambda: "fine") == "ok       a: fine"
    assert told("b", skipped) == "SKIPPED  b: no tool"
    assert told("c", failed) == "FAILED   c: wrong"


def test_a_snapshot_holds_what_the_build_sees_and_a_change_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CONTEXT", tmp_path / "context")
    build.snapshot()
    assert {path.name for path in build.CONTEXT.iterdir()} == {
        *build.let_through(), ".dockerignore", "Dockerfile",
    }  # fmt: skip
    before = (build.CONTEXT / "service" / "app.py").read_text(encoding="utf-8")
    build.change()
    assert (build.CONTEXT / "service" / "app.py").read_text(encoding="utf-8") == before + "# changed\n"
