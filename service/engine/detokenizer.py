"""Text from token ids as they come, never showing half a character."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import TokenizersBackend

BROKEN = "\ufffd"  # what a tokenizer decodes bytes to that are not (yet) a character
# A character is at most 4 bytes, so after this many tokens without a clean end something else goes on.
MOST_PENDING = 8
# SentencePiece's byte tokens are decoded in runs, and a character that has begun breaks all of its run for
# the moment: waiting so much longer delays nothing but the text of answers that are broken anyway.
MOST_PENDING_IN_RUN = 256
_BYTE_TOKEN = "<0x0A>"  # noqa: S105


class Detokenizer:
    """The pieces joined are `tokenizer.decode(ids, skip_special_tokens=True)`, for all ids of a valid text.

    Decodes a short window that begins before the new tokens, because some decoders treat the first token
    otherwise (SentencePiece drops its space); a window that ends in a broken character waits for more.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = decoder_of(tokenizer)
        self._special = frozenset(tokenizer.all_special_ids)
        self._most_pending = MOST_PENDING_IN_RUN if _decodes_in_runs(tokenizer) else MOST_PENDING
        self._window: list[int] = []
        self._pending = 0  # tokens at the window's end since it last was shown whole
        self._shown = 0  # characters of the window's text that have been shown

    def push(self, token_id: int) -> str:
        """Take a token, give the text that is certain now."""
        if token_id in self._special:
            return ""
        self._window.append(token_id)
        self._pending += 1
        text = self._decode(self._window)
        if not text.endswith(BROKEN):
            return self._show_all(text)
        return self._show_most(text) if self._pending > self._most_pending else ""

    def flush(self) -> str:
        """What is left; bytes that never became a character are U+FFFD."""
        rest = self._decode(self._window)[self._shown :]
        self._window, self._pending, self._shown = [], 0, 0
        return rest

    def _show_all(self, text: str) -> str:
        piece = text[self._shown :]
        if piece:  # a token without text is no context to decode the next one in
            self._shorten(self._pending)
            self._shown = len(self._decode(self._window))
            self._pending = 0
        return piece

    def _show_most(self, text: str) -> str:
        """For broken bytes without end, and characters that tokens cut again and again: all but the last one,
        which may have begun and not ended."""
        piece = text[self._shown : -1]
        self._shorten(self._most_pending // 2)
        self._shown = max(len(self._decode(self._window)) - 1, 0)
        return piece

    def _shorten(self, tokens: int) -> None:
        del self._window[:-tokens]


def decoder_of(tokenizer: Any) -> Callable[[list[int]], str]:
    """`tokenizer.decode(ids, skip_special_tokens=True)`, without what transformers does around a decoder of
    the tokenizers library, which takes four times as long as the decoder itself."""
    bare = isinstance(tokenizer, TokenizersBackend) and not _changes_text(tokenizer)
    decode = tokenizer.backend_tokenizer.decode if bare else tokenizer.decode
    return partial(decode, skip_special_tokens=True)


def _changes_text(tokenizer: TokenizersBackend) -> bool:
    """Whether its class, or its clean-up ("it 's" becomes "it's"), comes after the decoder."""
    kind, plain = type(tokenizer), TokenizersBackend
    if (kind.decode, kind._decode) != (plain.decode, plain._decode):
        return True
    bpe = type(tokenizer.backend_tokenizer.model).__name__ == "BPE"
    # As in TokenizersBackend._decode, which spares BPE unless it is told otherwise by this name.
    spared = bpe and not tokenizer.clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output
    return bool(tokenizer.clean_up_tokenization_spaces) and not spared


def _decodes_in_runs(tokenizer: Any) -> bool:
    token_id = tokenizer.convert_tokens_to_ids(_BYTE_TOKEN)
    return token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == _BYTE_TOKEN
