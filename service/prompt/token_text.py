"""One token by itself, as text and as bytes: what `logprobs` shows, and which token ids there are."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

CACHED = 16_384  # tokens whose text is remembered; a few megabytes
# Decoders that join tokens and change none of them.
_JOINERS = frozenset({"Fuse", "Strip"})


@dataclass(frozen=True, slots=True)
class TokenText:
    """`raw` are the token's bytes, which may be a part of a character; then `text` has U+FFFD for it."""

    text: str
    raw: bytes


class TokenTexts:
    """The vocabulary of one tokenizer. Joined, the bytes of an answer's tokens are its text.

    Reads the names of tokens by the decoder of tokenizer.json: GPT-2's alphabet for bytes (`ByteLevel`),
    SentencePiece's ▁ and <0x0A> (`Replace`, `Metaspace`, `ByteFallback`). Tokens of any other decoder are
    decoded one by one, and their bytes are those of the text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {id_: token.content for id_, token in tokenizer.added_tokens_decoder.items()}
        self._names = _Names.of(tokenizer)
        self.count = 1 + max(tokenizer.get_vocab().values())  # ids are 0 to count - 1
        self.of = lru_cache(CACHED)(self._of)

    def _of(self, token_id: int) -> TokenText:
        """An id without a token (a vocabulary is often padded) is empty."""
        raw = self._raw(token_id)
        return TokenText(raw.decode("utf-8", "replace"), raw)

    def _raw(self, token_id: int) -> bytes:
        if token_id in self._added:
            return str(self._added[token_id]).encode()
        if not 0 <= token_id < self.count:
            return b""
        if self._names is None:
            return str(self._tokenizer.decode([token_id])).encode()
        name = self._tokenizer.convert_ids_to_tokens(token_id)
        return b"" if name is None else self._names.raw(name)


@dataclass(frozen=True)
class _Names:
    """How a tokenizer's names of tokens are read."""

    replaced: tuple[tuple[str, str], ...] = ()
    byte_level: bool = False
    byte_tokens: bool = False

    @classmethod
    def of(cls, tokenizer: Any) -> _Names | None:
        """None: by a decoder that is not known here."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return None
        steps = list(_steps(json.loads(backend.decoder.__getstate__())))
        replaced = [_replacement(step) for step in steps if step["type"] in ("Replace", "Metaspace")]
        kinds = {step["type"] for step in steps} - _JOINERS
        if None in replaced or kinds - {"Replace", "Metaspace", "ByteLevel", "ByteFallback"}:
            return None
        known = tuple(pair for pair in replaced if pair)
        return cls(known, "ByteLevel" in kinds, "ByteFallback" in kinds)

    def raw(self, name: str) -> bytes:
        if self.byte_tokens and _is_byte(name):
            return bytes([int(name[3:5], 16)])
        for old, new in self.replaced:
            name = name.replace(old, new)
        if self.byte_level and all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name)
        return name.encode("utf-8", "replace")


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for step in decoder["decoders"]:
        yield from _steps(step)


def _replacement(step: Mapping[str, Any]) -> tuple[str, str] | None:
    """What stands for what; None for a regular expression."""
    if step["type"] == "Metaspace":
        return step["replacement"], " "
    old = step["pattern"].get("String")
    return (old, step["content"]) if old is not None else None


def _is_byte(name: str) -> bool:
    return len(name) == 6 and name.startswith("<0x") and name.endswith(">")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a printable character of Latin-1 is itself, the other bytes follow from U+0100 on."""
    printable = [byte for first, last in ("!~", "¡¬", "®ÿ") for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_alphabet()
