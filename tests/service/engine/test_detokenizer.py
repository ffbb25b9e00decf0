from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import service
from service.engine.detokenizer import BROKEN, MOST_PENDING, Detokenizer, decoder_of

DEMO = Path(service.__file__).parent / "demo"
EMOJI = "\U0001f469\u200d\U0001f4bb"  # several code points, 11 bytes
TEXTS = ["hello", " the", "你好", "😀", EMOJI, " ", "  ", "\n", "é", "\u0301", "a�b", "��", "。"]
texts = st.lists(st.one_of(st.sampled_from(TEXTS), st.text(max_size=8)), max_size=12).map("".join)


def sentencepiece():
    """As Llama 2's: spaces are ▁, one is put in front, what is not in the vocabulary is spelled in bytes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "▁h", "▁he"]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    backend = Tokenizer(
        models.BPE(vocab, [("▁", "h"), ("▁h", "e")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "demo"])
def any_tokenizer(request, tokenizer):
    if request.param == "byte-level":
        return tokenizer
    if request.param == "sentencepiece":
        return sentencepiece()
    return AutoTokenizer.from_pretrained(DEMO)


def pieces_of(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push(token) for token in ids]
    return [*pieces, detokenizer.flush()]


def whole(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=300, deadline=None)
@given(text=texts)
def test_the_pieces_joined_are_the_decoded_whole(any_tokenizer, text):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces_of(any_tokenizer, ids)) == whole(any_tokenizer, ids)


@settings(max_examples=200, deadline=None)
@given(text=texts.filter(lambda text: BROKEN not in text))
def test_no_piece_of_a_whole_text_is_broken(any_tokenizer, text):
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    assert not any(BROKEN in piece for piece in pieces_of(any_tokenizer, ids))


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_special_tokens_between_are_not_shown(any_tokenizer, data):
    text = data.draw(texts)
    ids = any_tokenizer.encode(text, add_special_tokens=False)
    for _ in range(data.draw(st.integers(0, 4))):
        ids.insert(
            data.draw(st.integers(0, len(ids))), data.draw(st.sampled_from(any_tokenizer.all_special_ids))
        )
    assert "".join(pieces_of(any_tokenizer, ids)) == whole(any_tokenizer, ids)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_at_all_give_text_and_no_error(any_tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, len(any_tokenizer) - 1), max_size=60))
    assert isinstance("".join(pieces_of(any_tokenizer, ids)), str)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_broken_bytes_of_a_byte_level_tokenizer_come_out_as_in_the_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(2, len(tokenizer) - 1), max_size=60))
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)


def test_a_character_comes_with_its_last_byte(tokenizer):
    ids = tokenizer.encode("🦊", add_special_tokens=False)
    assert len(ids) == 3
    assert pieces_of(tokenizer, ids) == ["", "", "🦊", ""]


def test_a_character_that_never_ends_is_flushed_as_broken(tokenizer):
    ids = tokenizer.encode("a🦊", add_special_tokens=False)[:-1]
    assert pieces_of(tokenizer, ids) == ["a", "", "", BROKEN]


def test_broken_bytes_without_end_are_shown_as_they_come_and_decoded_in_short_windows(tokenizer):
    lone = tokenizer.encode("🦊", add_special_tokens=False)[-1]  # a continuation byte

    windows = []

    class Counting:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, ids, **options):
            windows.append(len(ids))
            return tokenizer.decode(ids, **options)

    pieces = pieces_of(Counting(), [lone] * 500)
    assert "".join(pieces) == BROKEN * 500
    assert len(pieces[-1]) == 1
    assert max(windows) <= MOST_PENDING + 1


def wordpiece(**options):
    vocab = {word: at for at, word in enumerate(["[UNK]", "it", "'", "s", ",", "##self"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **options)


@pytest.mark.parametrize("cleaned", [False, True])
def test_what_transformers_cleans_up_after_the_decoder_is_cleaned_up_here(cleaned):
    tokenizer = wordpiece(clean_up_tokenization_spaces=cleaned)
    text = decoder_of(tokenizer)([1, 2, 3, 4, 1, 5])
    assert text == tokenizer.decode([1, 2, 3, 4, 1, 5], skip_special_tokens=True)
    assert (" ," in text) is not cleaned


def test_a_tokenizer_class_that_decodes_by_itself_is_asked():
    class Shouting(PreTrainedTokenizerFast):
        def _decode(self, token_ids, **options):
            return super()._decode(token_ids, **options).upper()

    tokenizer = Shouting(tokenizer_object=wordpiece().backend_tokenizer, unk_token="[UNK]")
    assert decoder_of(tokenizer)([1, 5]) == "ITSELF"


def test_a_decoder_of_the_tokenizers_library_is_called_directly(tokenizer, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", None)
    assert decoder_of(tokenizer)(tokenizer.backend_tokenizer.encode("hello").ids) == "hello"
