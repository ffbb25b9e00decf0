"""loader/hub.py against a hub on this machine: a real HTTP server and the real huggingface_hub.

huggingface_hub reads HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE when it is imported, so each call is a process.
"""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

import loader
from loader.checkpoint import read

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"

READ = """
import json, sys
from dataclasses import replace
from loader import checkpoint, hub
from loader.errors import LoaderError
try:
    spec = checkpoint.read({source!r}, {revision!r})
    result = dict(
        path=spec.path and str(spec.path), tensors=len(spec.tensors), file_bytes=spec.file_bytes,
        revision=spec.revision, model_type=spec.model_type, generation_config=spec.generation_config,
        first=[spec.tensors[0].name, spec.tensors[0].file, spec.tensors[0].start],
    )
    {then}
except LoaderError as err:
    result = dict(error=type(err).__name__, message=str(err), exit_code=err.exit_code)
result["torch"] = "torch" in sys.modules
print(json.dumps(result))
"""
FETCH = "result['folder'] = str(hub.fetched(hub.fetched(spec)).path)"
DOWNLOAD = "result['folder'] = str(hub.download(spec.source, spec.revision))"


@dataclass
class Repo:
    folder: Path
    commit: str = COMMIT
    status: int = 200
    error_code: str = ""


@dataclass
class FakeHub:
    """A hub with the answers that are needed: a model's info, its tree, its files whole or in part."""

    ranges: bool = True
    repos: dict[str, Repo] = field(default_factory=dict)
    log: list[tuple[str, str, str | None, int]] = field(
        default_factory=list
    )  # method, path, range, bytes sent
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def sent(self, suffix: str) -> list[tuple[str, str | None, int]]:
        return [(method, ranged, n) for method, path, ranged, n in self.log if path.endswith(suffix)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        parts = urlsplit(self.path).path.strip("/").split("/")
        is_api = parts[:2] == ["api", "models"]
        owner, name, *rest = parts[2:] if is_api else parts
        repo = self.hub.repos.get(f"{owner}/{name}")
        if repo is None or repo.status != 200:
            return self.fail(repo.status if repo else 404, repo.error_code if repo else "RepoNotFound")
        if is_api:
            return self.api(repo, rest)
        return self.file(repo, rest[1], "/".join(rest[2:]))

    def api(self, repo, rest):
        files = sorted(p for p in repo.folder.rglob("*") if p.is_file())
        names = [p.relative_to(repo.folder).as_posix() for p in files]
        if rest[:1] == ["tree"]:
            assert "recursive" in parse_qs(urlsplit(self.path).query)
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": f"oid-{n}"}
                for n, p in zip(names, files, strict=True)
            ]
            return self.json(tree)
        if rest[:1] == ["revision"] and rest[1] not in ("main", "v1", repo.commit):
            return self.fail(404, "RevisionNotFound")
        return self.json({"id": "x/y", "sha": repo.commit, "siblings": [{"rfilename": n} for n in names]})

    def file(self, repo, revision, name):
        path = repo.folder / name
        if not path.is_file():
            return self.fail(404, "EntryNotFound")
        size = path.stat().st_size
        start, end, ranged = 0, size, self.headers.get("Range") if self.hub.ranges else None
        if ranged:
            first, last = ranged.removeprefix("bytes=").split("-")
            start, end = int(first), min(int(last or size) + 1, size)
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        self.send_header("Content-Length", str(end - start))
        self.send_header("ETag", f'"{name}-{repo.commit}"')
        self.send_header("X-Repo-Commit", revision if len(revision) == len(COMMIT) else repo.commit)
        self.end_headers()
        self.body(path, start, end)

    def body(self, path, start, end):
        sent = 0
        if self.command == "GET":
            try:
                with path.open("rb") as stream:
                    stream.seek(start)
                    while sent < end - start:
                        sent += self.wfile.write(stream.read(min(65536, end - start - sent)))
            except ConnectionError:
                self.close_connection = True  # the client had read enough
        self.hub.log.append((self.command, urlsplit(self.path).path, self.headers.get("Range"), sent))

    def json(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.hub.log.append((self.command, urlsplit(self.path).path, None, len(body)))

    def fail(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()
        self.hub.log.append((self.command, urlsplit(self.path).path, None, 0))

    def log_message(self, *args):
        """Nothing on stderr."""


@pytest.fixture
def fake_hub():
    fake = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": fake}))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    fake.url = f"http://127.0.0.1:{server.server_port}"
    yield fake
    server.shutdown()
    server.server_close()


@pytest.fixture
def tiny(tmp_path, fake_checkpoint, configs, fake_hub):
    """The model "owner/tiny", with files beside it that nobody needs."""
    folder = fake_checkpoint(tmp_path / "hub" / "tiny", configs["tiny"], shards=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": 7}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "original").mkdir()
    for name in ("pytorch_model.bin", "original/consolidated.00.pth", "original/params.json", "README.md"):
        (folder / name).write_bytes(b"not wanted")
    (folder / "consolidated.safetensors").write_bytes(b"not wanted")
    fake_hub.repos["owner/tiny"] = Repo(folder)
    return folder


@pytest.fixture
def ask(tmp_path, fake_hub):
    """Read "owner/…" in a process of its own and return what it printed; the cache is the test's."""

    def call(source, revision=None, then="", **env):
        code = READ.format(source=source, revision=revision, then=then)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        paths = {"HF_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(Path(loader.__file__).parents[1])}
        ran = subprocess.run(
            [sys.executable, "-c", code],
            env={**clean, **paths, "HF_ENDPOINT": fake_hub.url, "HF_HUB_DISABLE_TELEMETRY": "1", **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert ran.returncode == 0, ran.stderr
        return {**json.loads(ran.stdout), "stderr": ran.stderr}

    return call


def test_a_plan_of_a_14_gb_model_fetches_headers_and_no_weights(
    tmp_path, ask, fake_hub, fake_checkpoint, configs
):
    folder = fake_checkpoint(tmp_path / "hub" / "big", configs["qwen2-7b"], shards=4)
    fake_hub.repos["owner/big"] = Repo(folder)

    found = ask("owner/big")

    local = read(folder)
    assert (found["tensors"], found["file_bytes"]) == (339, 15_231_233_024)
    first = local.tensors[0]
    assert found["first"] == [first.name, first.file, first.start]
    assert (found["path"], found["revision"], found["torch"]) == (None, COMMIT, False)
    shards = fake_hub.sent(".safetensors")
    assert len(shards) >= 4
    assert all(method == "GET" and ranged for method, ranged, _ in shards)
    assert sum(n for _, _, n in shards) < 200_000


def test_a_header_longer_than_the_first_range_takes_a_second(
    tmp_path, ask, fake_hub, fake_checkpoint, configs
):
    folder = fake_checkpoint(tmp_path / "hub" / "one", configs["qwen2-7b"])
    fake_hub.repos["owner/one"] = Repo(folder)
    assert ask("owner/one")["tensors"] == 339
    ranges = [ranged for _, ranged, _ in fake_hub.sent("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] == "bytes=0-16383"
    assert ranges[1].startswith("bytes=16384-")


def test_a_server_without_ranges_is_not_read_to_the_end(tmp_path, ask, fake_hub, fake_checkpoint, configs):
    folder = fake_checkpoint(tmp_path / "hub" / "big", configs["qwen2-7b"], shards=4)
    fake_hub.repos["owner/big"] = Repo(folder)
    fake_hub.ranges = False
    assert ask("owner/big")["tensors"] == 339
    # What a socket buffers is sent before the client hangs up; the model has 15 GB.
    assert sum(n for _, _, n in fake_hub.sent(".safetensors")) < 100_000_000


def test_a_shard_that_is_broken_on_the_hub_is_named(ask, tiny):
    file = tiny / "model-00002-of-00002.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    found = ask("owner/tiny")
    assert found["error"] == "TruncatedShard"
    assert "owner/tiny/model-00002-of-00002.safetensors" in found["message"]


def test_a_download_shows_its_progress_and_a_plan_is_not_buried_in_bars(ask, tiny):
    as_in_a_terminal = {"TQDM_POSITION": "-1"}  # how huggingface_hub is told to draw bars without one
    assert ask("owner/tiny", **as_in_a_terminal)["stderr"] == ""
    assert "100%" in ask("owner/tiny", then=DOWNLOAD, **as_in_a_terminal)["stderr"]


def test_small_files_come_from_the_hub_too(ask, tiny):
    found = ask("owner/tiny")
    assert (found["model_type"], found["generation_config"]) == ("qwen2", {"eos_token_id": 7})


def test_a_download_takes_what_loading_needs_and_nothing_else(ask, tiny, fake_hub):
    found = ask("owner/tiny", then=DOWNLOAD)
    folder = Path(found["folder"])
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }  # fmt: skip
    assert read(folder).file_bytes == found["file_bytes"]
    for unwanted in (".bin", ".pth", "params.json", "consolidated.safetensors"):
        assert not fake_hub.sent(unwanted)


EXPORT = "('LICENSE*', '*.py', 'additional_chat_templates/*')"


def test_who_writes_a_model_on_gets_more_of_it(ask, tiny):
    (tiny / "additional_chat_templates").mkdir()
    for name in ("LICENSE", "modeling_x.py", "original/x.py", "additional_chat_templates/rag.jinja"):
        (tiny / name).write_text(name)
    names = {"LICENSE", "modeling_x.py", "additional_chat_templates/rag.jinja"}
    folder = Path(ask("owner/tiny", then=FETCH)["folder"])
    assert not [name for name in names if (folder / name).exists()]
    # Also of a model that is in the cache already.
    found = ask("owner/tiny", then=f"result['folder'] = str(hub.fetched(spec, {EXPORT}).path)")
    assert found["path"] == found["folder"] == str(folder)
    assert {name: (folder / name).read_text() for name in names} == {name: name for name in names}
    assert not [*folder.rglob("original/*"), *folder.rglob("*.bin")]


def test_more_that_the_model_does_not_have_is_no_error(ask, tiny):
    assert "folder" in ask("owner/tiny", then=f"result['folder'] = str(hub.fetched(spec, {EXPORT}).path)")


@pytest.mark.parametrize("source", ["owner/tiny", "owner/tiny@v1"])
def test_what_was_planned_is_fetched_although_its_branch_has_moved_on(ask, tiny, fake_hub, source):
    fake_hub.repos["owner/tiny"].commit = NEXT_COMMIT
    planned = f"hub.fetched(replace(spec, revision={COMMIT!r}))"
    found = ask(source, then=f"s = {planned}; result.update(fetched=[s.source, s.revision, str(s.path)])")
    assert found["fetched"][:2] == [source, COMMIT]
    assert Path(found["fetched"][2]).name == COMMIT
    assert read(found["fetched"][2]).file_bytes == found["file_bytes"]
    assert found["revision"] == NEXT_COMMIT


def test_a_commit_in_the_cache_is_read_there_without_asking_for_its_branch(ask, tiny, fake_hub):
    folder = ask("owner/tiny@v1", then=FETCH)["folder"]
    fake_hub.log.clear()
    found = ask(f"owner/tiny@{COMMIT}")
    assert (found["path"], found["revision"]) == (folder, COMMIT)
    assert [path for _, path, _, _ in fake_hub.log] == [f"/api/models/owner/tiny/revision/{COMMIT}"]


def test_what_is_downloaded_is_read_from_the_cache_from_then_on(ask, tiny, fake_hub):
    first = ask("owner/tiny", then=DOWNLOAD)
    fake_hub.log.clear()
    second = ask("owner/tiny", then=DOWNLOAD)
    assert second["path"] == first["folder"] == second["folder"]
    assert not fake_hub.sent(".safetensors")


def test_offline_a_downloaded_model_needs_no_hub(ask, tiny, fake_hub):
    folder = ask("owner/tiny", then=DOWNLOAD)["folder"]
    fake_hub.log.clear()
    found = ask("owner/tiny", then=DOWNLOAD, HF_HUB_OFFLINE="1")
    assert found["path"] == found["folder"] == folder
    assert found["revision"] == COMMIT
    assert fake_hub.log == []


def test_without_a_network_a_downloaded_model_is_still_read(ask, tiny):
    folder = ask("owner/tiny", then=DOWNLOAD)["folder"]
    assert ask("owner/tiny", HF_ENDPOINT="http://127.0.0.1:9")["path"] == folder


def test_offline_a_model_that_was_only_planned_is_refused(ask, tiny):
    assert ask("owner/tiny")["path"] is None
    found = ask("owner/tiny", HF_HUB_OFFLINE="1")
    assert (found["error"], found["exit_code"]) == ("HubError", 42)
    assert "HF_HUB_OFFLINE" in found["message"]
    assert "hf download owner/tiny" in found["message"]


def test_offline_small_files_alone_are_not_taken_for_the_model(ask, tiny):
    ask("owner/tiny")
    assert ask(f"owner/tiny@{COMMIT}", HF_HUB_OFFLINE="1")["error"] == "HubError"


def test_an_interrupted_download_is_planned_from_the_hub_and_completed(ask, tiny, fake_hub):
    folder = Path(ask("owner/tiny", then=DOWNLOAD)["folder"])
    (folder / "model-00002-of-00002.safetensors").unlink()
    for listing in (folder.parents[1] / "trees").glob("*"):
        listing.unlink()  # not every huggingface_hub keeps one
    found = ask("owner/tiny", then=DOWNLOAD)
    assert found["path"] is None
    assert found["folder"] == str(folder)
    assert read(folder).file_bytes == found["file_bytes"]


def test_a_new_commit_on_the_hub_is_planned_and_the_old_one_is_not_taken_for_it(ask, tiny, fake_hub):
    ask("owner/tiny", then=DOWNLOAD)
    fake_hub.repos["owner/tiny"].commit = NEXT_COMMIT
    found = ask("owner/tiny")
    assert (found["path"], found["revision"]) == (None, NEXT_COMMIT)


@pytest.mark.parametrize(("source", "revision"), [("owner/tiny@v1", None), ("owner/tiny", "v1")])
def test_a_revision_is_asked_for_and_pinned_to_its_commit(ask, tiny, fake_hub, source, revision):
    found = ask(source, revision, then=DOWNLOAD)
    assert found["revision"] == COMMIT
    assert Path(found["folder"]).name == COMMIT
    assert fake_hub.sent("/api/models/owner/tiny/revision/v1")


def test_a_plan_of_a_revision_is_carried_out_in_the_folder_of_its_commit(ask, tiny):
    assert Path(ask("owner/tiny@v1", then=FETCH)["folder"]).name == COMMIT


@pytest.mark.parametrize(
    ("source", "revision", "words"),
    [
        ("owner/tiny", "v9", ("no revision 'v9'",)),
        ("owner/tiny@v1", "v9", ("give one",)),
        ("owner/nope", None, ("no such folder", "no such model", "HF_TOKEN", "hf auth login")),
    ],
)
def test_what_the_hub_does_not_have_is_refused_with_what_to_do(ask, tiny, source, revision, words):
    found = ask(source, revision)
    assert (found["error"], found["exit_code"]) == ("HubError", 42)
    assert all(word in found["message"] for word in words), found["message"]


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (401, "", ("HF_TOKEN", "hf auth login")),
        (403, "GatedRepo", ("is gated", "/owner/tiny", "HF_TOKEN")),
        (403, "", ("refuses the token (403)", "hf auth login")),
    ],
)
def test_a_closed_door_is_refused_with_how_to_log_in(ask, tiny, fake_hub, status, code, words):
    fake_hub.repos["owner/tiny"].status, fake_hub.repos["owner/tiny"].error_code = status, code
    found = ask("owner/tiny")
    assert (found["error"], found["exit_code"]) == ("HubError", 42)
    assert all(word in found["message"] for word in words), found["message"]


def test_the_token_is_sent(ask, tiny, fake_hub):
    ask("owner/tiny", HF_TOKEN="hf_for_this_test")
    assert fake_hub.tokens == {"Bearer hf_for_this_test"}


def test_a_hub_that_is_down_is_worth_another_try(ask, tiny, fake_hub):
    fake_hub.repos["owner/tiny"].status = 503
    found = ask("owner/tiny")
    assert (found["error"], found["exit_code"]) == ("HubError", 75)
    assert "503" in found["message"]


def test_no_network_is_worth_another_try(ask, tiny):
    found = ask("owner/tiny", HF_ENDPOINT="http://127.0.0.1:9")
    assert (found["error"], found["exit_code"]) == ("HubError", 75)
    assert "http://127.0.0.1:9 cannot be reached" in found["message"]


def test_a_hub_model_without_weights_or_of_another_kind_is_refused_as_a_folder_is(ask, tiny):
    (tiny / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    assert ask("owner/tiny")["error"] == "UnsupportedModel"
    (tiny / "config.json").unlink()
    assert ask("owner/tiny")["error"] == "NoConfig"
