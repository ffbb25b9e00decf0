"""How many tokens a folder's tokenizer knows, and which one ends a text; without building the tokenizer.

A tokenizer.json, parsed whole, takes ten times its size of memory (170 MB for 17), and more than half of that
are merges, which do not matter here: only the vocabulary is parsed. Formats: tokenizer.json (tokenizers),
vocab.json and added_tokens.json (transformers), tokenizer.model (sentencepiece's ModelProto), .tiktoken
(tiktoken), tekken.json (mistral-common).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# No token can look like this: a quote inside of a string has a backslash before it.
_VOCABULARY = re.compile(rb'"vocab"\s*:\s*(?=[{\[])')
_MERGES = re.compile(rb'"merges"\s*:\s*\[')
_ADDED = re.compile(rb'"added_tokens"\s*:\s*(?=\[)')
_MODEL = re.compile(rb'"model"\s*:\s*\{')
_TEKKEN_ROWS = re.compile(rb'"default_vocab_size"\s*:\s*(\d+)')


def tokenizer_rows(folder: Path) -> int | None:
    """1 + the highest token id of the tokenizer in a folder: so many rows its model's embeddings need.

    None where there is no tokenizer, or none that can be read. Tokens that only a tokenizer's own code adds
    (Qwen v1) are not counted.
    """
    rows = _rows_of(folder, _FAST) or _rows_of(folder, _SLOW)
    added = [int(key) + 1 for key in _added_by_config(folder)]
    return max([rows, *added]) if rows else None


def ends_text(folder: Path) -> int | None:
    """The id of the token that a folder's tokenizer ends a text with (eos_token); None if it is not told."""
    token = _content(_json(folder / "tokenizer_config.json").get("eos_token"))
    token = token or _content(_json(folder / "special_tokens_map.json").get("eos_token"))
    return None if token is None else _id_of(folder, token)


def _id_of(folder: Path, token: str) -> int | None:
    for key, entry in _added_by_config(folder).items():
        if _content(entry) == token:
            return int(key)
    fast = _bytes(folder / "tokenizer.json")
    for entry in _added_tokens(fast):
        if entry["content"] == token:
            return int(entry["id"])
    for names in (fast, _bytes(folder / "added_tokens.json"), _bytes(folder / "vocab.json")):
        for text in {json.dumps(token), json.dumps(token, ensure_ascii=False)}:
            if match := re.search(re.escape(text.encode()) + rb"\s*:\s*(\d+)", names):
                return int(match[1])
    return None


# How many ids a file has


def _fast_rows(content: bytes) -> int | None:
    vocabulary = _value(content, _VOCABULARY, _MERGES)
    if not vocabulary:
        return None
    # A list of tokens with their scores (Unigram), or an object of ids.
    rows = len(vocabulary) if isinstance(vocabulary, list) else 1 + max(vocabulary.values())
    return max([rows, *(1 + entry["id"] for entry in _added_tokens(content))])


def _object_rows(content: bytes) -> int | None:
    return 1 + max(json.loads(content).values())


def _value(content: bytes, key: re.Pattern[bytes], after: re.Pattern[bytes]) -> Any:
    """The value behind the first such key, cut off before `after` so that little is decoded; None without it.

    Raises ValueError where it is not JSON.
    """
    found = key.search(content)
    if not found:
        return None
    end = after.search(content, found.end())
    text = content[found.end() : end.start() if end else None].decode()
    return json.JSONDecoder().raw_decode(text)[0]


def _sentencepiece_rows(content: bytes) -> int | None:
    """Fields number 1 (pieces) of a protobuf message."""
    at, count = 0, 0
    while at < len(content):
        key, at = _varint(content, at)
        field, kind = key >> 3, key & 7
        if kind == 2:
            size, at = _varint(content, at)
            at += size
        elif kind == 0:
            _, at = _varint(content, at)
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            return None
        count += field == 1
    return count if at == len(content) else None


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (content[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if content[at - 1] < 0x80:
            return value, at


def _tiktoken_rows(content: bytes) -> int | None:
    return 1 + max(int(line.rsplit(b" ", 1)[1]) for line in content.splitlines() if line)


def _tekken_rows(content: bytes) -> int | None:
    match = _TEKKEN_ROWS.search(content)
    return int(match[1]) if match else None


# A pattern of names, and what counts the ids of such a file.
Counters = Mapping[str, Callable[[bytes], int | None]]
_FAST: Counters = {"tokenizer.json": _fast_rows}
_SLOW: Counters = {
    "vocab.json": _object_rows, "added_tokens.json": _object_rows, "tokenizer.model": _sentencepiece_rows,
    "*.tiktoken": _tiktoken_rows, "tekken.json": _tekken_rows,
}  # fmt: skip


def _rows_of(folder: Path, counters: Counters) -> int:
    """The most that any of these files has; 0 where there is none."""
    found = [0]
    for pattern, count in counters.items():
        for path in sorted(folder.glob(pattern)):
            try:
                found.append(count(path.read_bytes()) or 0)
            except (ValueError, IndexError, TypeError, AttributeError, RecursionError):
                continue  # damaged: whoever builds the tokenizer says so better
    return max(found)


# What the configurations add


def _added_tokens(content: bytes) -> Iterator[dict[str, Any]]:
    """`added_tokens` of a tokenizer.json."""
    try:
        entries = _value(content, _ADDED, _MODEL) or []
    except (ValueError, RecursionError):
        return
    for entry in entries:
        if isinstance(entry, dict) and type(entry.get("id")) is int and _content(entry) is not None:
            yield entry


def _added_by_config(folder: Path) -> dict[str, Any]:
    found = _json(folder / "tokenizer_config.json").get("added_tokens_decoder")
    return {key: entry for key, entry in found.items() if key.isdecimal()} if isinstance(found, dict) else {}


def _content(token: object) -> str | None:
    """A token as the configurations write it: text, or an object with its text."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_bytes(path) or b"{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bytes(path: Path) -> bytes:
    return path.read_bytes() if path.is_file() else b""
