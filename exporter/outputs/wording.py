"""Names and lists as notes, manifests and model cards write them: nothing in them tells of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from loader.checkpoint import HUB_ID

_HUB_CACHE = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\][^/\\]+[/\\]?\Z")


def hub_id(*candidates: str | None) -> str | None:
    """The first of them that reads as a hub id, without its revision: `--base`, base_model_name_or_path."""
    matches = (HUB_ID.fullmatch(text) for text in candidates if text)
    return next((match[1] for match in matches if match), None)


def short_name(source: str) -> str:
    """A hub id as it is, with its revision; of a path its last component, however the path was typed.

    What is a folder here is a path, even where it reads as a hub id. A path of another machine, which may be
    Windows', gives its last component too, and one into the hub's cache the hub id.
    """
    if cached := _HUB_CACHE.search(source):
        return f"{cached[1]}/{cached[2]}"
    path = os.path.expanduser(source)
    if hub_id(source) and not os.path.exists(path):
        return source
    return re.split(r"[/\\]", os.path.abspath(path).rstrip("/\\"))[-1] or source


def listed(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c" """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
