"""Qwen v1's vocabulary (qwen.tiktoken) as a fast tokenizer that needs no code from the checkpoint.

A .tiktoken file has a line per token: its bytes in base64, and its rank. tiktoken merges whichever two
neighbours make the token of the lowest rank; tokenizer.json wants the list of merges instead, which is
recovered here. Split, normalization and special tokens are those of QwenLM's tokenization_qwen.py.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from exporter.errors import BadVocabulary
from exporter.outputs.config import json_bytes
from loader.headers import POINTER_BYTES, refuse_lfs_pointer

VOCABULARY = "qwen.tiktoken"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, *(f"<|extra_{i}|>" for i in range(205)))
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
# What Qwen v1's `chat` writes. There a user's text cannot hold a special token; here, as with every
# tokenizer.json, it can.
CHAT_TEMPLATE = (
    "{% if not messages or messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Ranks = Mapping[bytes, int]

_NO_RANK = 1 << 60


def convert_vocabulary(folder: Path, names: Collection[str]) -> dict[str, bytes]:
    """File name -> content of a fast tokenizer, from the folder of a Qwen v1 model or of an adapter to one.

    `names` are the files there: qwen.tiktoken is read, and tokenizer_config.json and generation_config.json
    where there are such. Raises BadVocabulary, or LfsPointer.
    """
    ranks = _read_ranks(folder / VOCABULARY)
    own = _read_json(folder / TOKENIZER_CONFIG) if TOKENIZER_CONFIG in names else {}
    if own.get("extra_vocab_file"):
        reason = f"it adds tokens from {own['extra_vocab_file']} (extra_vocab_file), which are not converted."
        raise BadVocabulary(str(folder / TOKENIZER_CONFIG), reason)
    generation = _read_json(folder / GENERATION_CONFIG) if GENERATION_CONFIG in names else {}
    special = {token: len(ranks) + at for at, token in enumerate(SPECIAL_TOKENS)}
    end = END_OF_TEXT if generation.get("chat_format") == "raw" else TURN_END
    return {
        TOKENIZER: _tokenizer(ranks, special),
        TOKENIZER_CONFIG: json_bytes(_tokenizer_config(own, special, end)),
    }


# Reading


def _read_ranks(file: Path) -> dict[bytes, int]:
    try:
        content = file.read_bytes()
    except OSError as err:
        raise BadVocabulary(str(file), f"cannot be read: {err.strerror or err}.") from None
    refuse_lfs_pointer(content[:POINTER_BYTES], str(file))
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if line.strip():
                reason = f"line {number} is not a token in base64 and its rank. Fetch the file again."
                raise BadVocabulary(str(file), reason) from None
    _check(ranks, file)
    return ranks


def _check(ranks: Ranks, file: Path) -> None:
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        reason = f"{len(missing)} of the 256 bytes are no token, first 0x{missing[0]:02x}. Fetch it again."
        raise BadVocabulary(str(file), reason)
    if sorted(ranks.values()) != list(range(len(ranks))):
        # The special tokens' ids follow the ranks: with a hole they would be others than the model knows.
        reason = f"its {len(ranks):,} tokens do not have the ranks 0 to {len(ranks) - 1:,}. Fetch it again."
        raise BadVocabulary(str(file), reason)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as err:
        raise BadVocabulary(str(file), f"is not valid JSON ({err}).") from None
    if not isinstance(content, dict):
        raise BadVocabulary(str(file), f"holds {type(content).__name__}, not an object.")
    return content


# tokenizer.json


def _tokenizer(ranks: Ranks, special: Mapping[str, int]) -> bytes:
    alphabet = _alphabet()

    def text(token: bytes) -> str:
        return token.decode("latin-1").translate(alphabet)

    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id_, **_added(token)} for token, id_ in special.items()],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # tiktoken too looks a whole piece up before it merges
            "vocab": {text(token): rank for token, rank in ranks.items()},
            # One string per merge is what tokenizers of every age read; no token has a space in it here.
            "merges": [f"{text(left)} {text(right)}" for left, right in merges(ranks)],
        },
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _alphabet() -> dict[int, int]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py: bytes_to_unicode)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {byte: 256 + at for at, byte in enumerate(others)}


def merges(ranks: Ranks) -> Iterator[tuple[bytes, bytes]]:
    """The two neighbours that each token is made of, in the order of ranks.

    They are the last two parts that tiktoken's own merging of the token's bytes comes to. In a longer text
    the same bytes, as long as nothing outside is merged into them, go through the same steps, so no other
    pair ever makes the token. A token that merging does not arrive at is only found whole, and has no merge.
    """
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1 and (parts := _last_two(token, ranks)):
            yield parts


def _last_two(token: bytes, ranks: Ranks) -> tuple[bytes, bytes] | None:
    """What 150,000 tokens go through: only the pairs beside the last merge are looked up again."""
    rank_of = ranks.get
    parts = [token[at : at + 1] for at in range(len(token))]
    found = [rank_of(token[at : at + 2], _NO_RANK) for at in range(len(token) - 1)]
    while len(parts) > 2:
        if (lowest := min(found)) == _NO_RANK:
            return None
        at = found.index(lowest)
        merged = parts[at] + parts.pop(at + 1)
        parts[at] = merged
        del found[at]
        if at:
            found[at - 1] = rank_of(parts[at - 1] + merged, _NO_RANK)
        if at < len(found):
            found[at] = rank_of(merged + parts[at + 1], _NO_RANK)
    return parts[0], parts[1]


# tokenizer_config.json


def _added(token: str) -> dict[str, Any]:
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    return {"content": token, **dict.fromkeys(flags, False), "special": True}


def _tokenizer_config(own: Mapping[str, Any], special: Mapping[str, int], end: str) -> dict[str, Any]:
    def said(key: str, otherwise: str) -> str:
        value = own.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) and value in special else otherwise

    template = own.get("chat_template")
    length = own.get("model_max_length")
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id_): _added(token) for token, id_ in special.items()},
        "additional_special_tokens": [TURN_START, TURN_END],
        "bos_token": None,
        "chat_template": template if isinstance(template, str) and template else CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": said("eos_token", end),
        "errors": "replace",
        **({"model_max_length": length} if isinstance(length, int) else {}),
        "pad_token": said("pad_token", END_OF_TEXT),
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
