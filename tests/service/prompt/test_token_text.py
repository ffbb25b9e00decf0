import unicodedata
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import service
from service.prompt.token_text import TokenText, TokenTexts

DEMO = Path(service.__file__).parent / "demo"
TEXTS = st.text(max_size=30).map(partial(unicodedata.normalize, "NFC"))  # as Qwen's tokenizer makes it
SPECIAL = ("<unk>", "<s>", "</s>")
SPACES = decoders.Replace("▁", " ")


def fast(backend):
    backend.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    backend.add_tokens([AddedToken("<tool ü>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def sentencepiece(decoder):
    """As Llama 2's: spaces are ▁, what is not in the vocabulary is spelled in bytes."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "▁h", "▁he", "好"]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    merges = [("▁", "h"), ("▁h", "e")]
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoder
    return fast(backend)


def byte_level():
    """GPT-2's alphabet and one merge."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: at for at, piece in enumerate([*SPECIAL, *alphabet, "Ġh"])}
    backend = Tokenizer(models.BPE(vocab, [("Ġ", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return fast(backend)


TOKENIZERS = {
    "demo": lambda: AutoTokenizer.from_pretrained(DEMO),
    "byte-level": byte_level,
    "sentencepiece": lambda: sentencepiece(
        decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    ),
    "metaspace": lambda: sentencepiece(
        decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])
    ),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def texts(any_tokenizer):
    return TokenTexts(any_tokenizer)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS)
def test_the_bytes_of_a_texts_tokens_joined_are_the_text(any_tokenizer, texts, text):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    assert b"".join(texts.of(id_).raw for id_ in ids) == text.encode()


def test_half_a_character_keeps_its_bytes_and_is_shown_as_broken(any_tokenizer, texts):
    ids = any_tokenizer.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    first = texts.of(ids[0])
    assert first.raw == "🙂".encode()[: len(first.raw)]
    assert first.text == "\ufffd"


def test_every_id_of_the_vocabulary_has_a_text_and_the_ids_beside_it_have_none(any_tokenizer, texts):
    assert texts.count == len(any_tokenizer)
    for id_ in range(texts.count):
        token = texts.of(id_)
        assert token.raw
        assert token.text == token.raw.decode("utf-8", "replace")
    assert texts.of(texts.count) == texts.of(-1) == TokenText("", b"")


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_added_tokens_are_what_they_are_called(kind):
    tokenizer = TOKENIZERS[kind]()
    texts = TokenTexts(tokenizer)
    for name in (*SPECIAL, "<tool ü>"):
        token_id = tokenizer.convert_tokens_to_ids(name)
        assert texts.of(token_id) == TokenText(name, name.encode())


def test_spaces_at_the_front_stay(any_tokenizer, texts):
    (first, *_) = any_tokenizer.encode(" he", add_special_tokens=False)
    assert texts.of(first).text.startswith(" ")


@pytest.mark.parametrize(
    "decoder", [decoders.WordPiece(), decoders.Sequence([decoders.Replace(Regex("▁"), " ")]), None]
)
def test_a_decoder_that_is_not_known_decodes_the_token_itself(decoder):
    tokenizer = sentencepiece(SPACES)
    if decoder:
        tokenizer.backend_tokenizer.decoder = decoder
    token_id = tokenizer.convert_tokens_to_ids("好")
    assert TokenTexts(tokenizer).of(token_id) == TokenText("好", "好".encode())
