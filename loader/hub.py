"""Models on the hub, with huggingface_hub's cache, token, offline mode (HF_HUB_OFFLINE) and HF_ENDPOINT.

Planning needs a model's small JSON files and the headers of its shards, so those alone are fetched: the
headers by HTTP range requests. Weights are downloaded when a plan is carried out.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loader.errors import HubError
from loader.files import Folder, ModelFiles
from loader.headers import LENGTH_BYTES, TensorInfo, header_length, parse_header
from loader.hub_errors import explained, http_error, is_busy, is_unreachable

if TYPE_CHECKING:
    from loader.checkpoint import ModelSpec

# What loading a model reads: nothing that is a pickle, Mistral's second copy of the weights, or in a folder.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
UNWANTED = ("*/*", "consolidated*", "adapter_*")
# The headers of most shards fit; a longer one takes a second request.
FIRST_RANGE_BYTES = 16 * 1024
PARALLEL_REQUESTS = 8
ASK_TIMEOUT_SECONDS = 10.0
RETRIES = 2

_SIZE_OF_RANGE = re.compile(r"bytes \d+-\d+/(\d+)")


def files(source: str, revision: str | None = None) -> ModelFiles:
    """The files of "owner/name" or "owner/name@revision", as far as a plan needs them.

    When all of the model is in the cache, that is its folder there; then the hub need not even be in reach.
    Raises HubError.
    """
    from huggingface_hub import is_offline_mode

    repo, revision = _split(source, revision)
    source = f"{repo}@{revision}" if revision else repo
    if is_offline_mode():
        return _cached_alone(source, repo, revision)
    with explained(source, revision):
        try:
            commit, names = _list(repo, revision)
        except http_error() as err:
            if (is_unreachable(err) or is_busy(err)) and (folder := _cached(repo, revision)) is not None:
                return Folder(source, folder, folder.name)
            raise
    folder = _cached(repo, commit)
    if folder is not None and all((folder / name).is_file() for name in names if _is_wanted(name)):
        return Folder(source, folder, commit)
    return HubFiles(source, repo, commit, frozenset(name for name in names if "/" not in name))


def download(source: str, commit: str | None = None, more: tuple[str, ...] = ()) -> Path:
    """Fetch what `files` left on the hub, with a progress bar, and give the model's folder in the cache.

    With `ModelSpec.source` and `ModelSpec.revision` that is just what was planned. What is in the cache
    already is not fetched again. `more` are patterns of files to fetch besides, for who writes the model on:
    "LICENSE*", "*.py"; in a folder only when the pattern names it: "additional_chat_templates/*". Raises
    HubError.
    """
    from huggingface_hub import snapshot_download

    repo, revision = _split(source, None)
    if commit is not None and not _is_at(repo, revision, commit):
        revision = commit
    in_folders = [pattern for pattern in more if "/" in pattern]
    with explained(source, revision):
        folder = Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=[*WANTED, *more], ignore_patterns=[*UNWANTED]
            )
        )
        if in_folders:
            with _no_progress_bars():  # its commit, or the branch might have moved meanwhile
                snapshot_download(repo, revision=folder.name, allow_patterns=in_folders)
    return folder


def fetched(spec: ModelSpec, more: tuple[str, ...] = ()) -> ModelSpec:
    """The same model with its weights on this machine: downloaded at its commit, unless they are here.

    Source, commit and headers stay what they are, also where its branch has moved on since they were read.
    `more` is for `download`, and fetched of a hub model in the cache too. Raises HubError.
    """
    is_here = spec.path and not (more and spec.revision)
    return spec if is_here else replace(spec, path=download(spec.source, spec.revision, more))


class HubFiles:
    """A model on the hub, at one commit. Small files go through the cache, headers are only looked at."""

    def __init__(self, source: str, repo: str, commit: str, names: frozenset[str]) -> None:
        self.source = source
        self.path: Path | None = None
        self.commit: str | None = commit
        self.names = names
        self._repo = repo

    def read(self, name: str) -> bytes:
        from huggingface_hub import hf_hub_download

        with explained(self.source, self.commit), _no_progress_bars():
            return Path(hf_hub_download(self._repo, name, revision=self.commit)).read_bytes()

    def tensors(self, names: list[str]) -> list[TensorInfo]:
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return [info for header in pool.map(self._header, names) for info in header]

    def _header(self, name: str) -> list[TensorInfo]:
        where = f"{self.source}/{name}"
        with explained(self.source, self.commit):
            begin, file_bytes = self._range(name, 0, FIRST_RANGE_BYTES)
            end = LENGTH_BYTES + header_length(begin, file_bytes, where)
            if len(begin) < end:
                begin += self._range(name, len(begin), end)[0]
        return parse_header(begin[LENGTH_BYTES:end], name, file_bytes, where)

    def _range(self, name: str, start: int, end: int) -> tuple[bytes, int]:
        """(bytes `start` to `end`, fewer where the file is shorter; the size of the whole file)."""
        from huggingface_hub import constants, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers, http_stream_backoff  # type: ignore[attr-defined]

        url = hf_hub_url(self._repo, name, revision=self.commit)
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with http_stream_backoff(
            "GET", url, max_retries=RETRIES, headers=headers, timeout=timeout
        ) as response:
            hf_raise_for_status(response)
            ranged = _SIZE_OF_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            skip = 0 if ranged else start  # a server that knows no ranges sends all: stop reading in time
            content = _take(response.iter_raw(), skip + end - start)[skip:]
            size = ranged[1] if ranged else response.headers.get("Content-Length", "0")
        return content, int(size)


def _take(chunks: Iterator[bytes], count: int) -> bytes:
    """The first `count` bytes of a stream; the rest is not read."""
    taken = bytearray()
    for chunk in chunks:
        taken += chunk
        if len(taken) > count:  # not >=: a stream that has been read to its end keeps its connection open
            break
    return bytes(taken[:count])


# The repository


def _split(source: str, revision: str | None) -> tuple[str, str | None]:
    repo, _, in_source = source.partition("@")
    if in_source and revision and revision != in_source:
        raise HubError(source, f"names a revision, and --revision is {revision}: give one.")
    return repo, revision or in_source or None


def _list(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """(commit, names of all files)."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(repo, revision=revision, timeout=ASK_TIMEOUT_SECONDS)
    return info.sha or revision or "main", [sibling.rfilename for sibling in info.siblings or []]


def _is_at(repo: str, revision: str | None, commit: str) -> bool:
    """Whether a branch or tag is at that commit. Downloaded by its name, it is found offline by its name."""
    try:
        return _list(repo, revision)[0] == commit
    except (http_error(), OSError):
        return False


def _is_wanted(name: str) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in WANTED) and not any(
        fnmatch.fnmatch(name, pattern) for pattern in UNWANTED
    )


# The cache


def _cached(repo: str, revision: str | None) -> Path | None:
    """The model's folder in the cache, if it is there; as far as can be told offline, with all its files."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=[*WANTED],
            ignore_patterns=[*UNWANTED],
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        return None
    path = Path(folder)
    return path if any(path.glob("*.safetensors")) else None


def _cached_alone(source: str, repo: str, revision: str | None) -> Folder:
    with explained(source, revision):
        folder = _cached(repo, revision)
    if folder is None:
        raise HubError(
            source,
            "is not wholly in the cache, and HF_HUB_OFFLINE forbids asking the hub. Unset it, or download "
            f"the model where there is a network: hf download {repo}",
        )
    return Folder(source, folder, folder.name)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """A bar for each of a few small files would bury the plan."""
    from huggingface_hub import utils as bars

    shown = not bars.are_progress_bars_disabled()  # type: ignore[attr-defined]
    bars.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bars()  # type: ignore[attr-defined]
