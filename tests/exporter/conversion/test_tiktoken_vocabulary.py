"""exporter/conversion/tiktoken_vocabulary.py: the ids of tiktoken itself, from a tokenizer.json."""

import base64
import json
import random
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
import regex
import tiktoken
from tokenizers import Tokenizer

from exporter.conversion.tiktoken_vocabulary import SPECIAL_TOKENS, SPLIT, convert_vocabulary, merges
from exporter.errors import BadVocabulary
from loader.errors import LfsPointer

CORPUS = (
    "The quick brown fox jumps over the lazy dog. It's what they're doing; we'll see, I'd say, IT'S fine.\n",
    "人工智能正在改变世界。你好！有什么可以帮助你的吗？　全角空格，和标点……\n人工智能可以帮助你。",
    "def forward(self, x):\n    if x > 10:\n\t\treturn [i ** 2 for i in range(x)]  # ok\n\n\n\r\n    pass",
    "🙂🙃👩‍👩‍👧‍👦 🇨🇳🎉🎉🎉 zero\u200bwidth \u00a0nbsp\u2028line",
    "   leading,  double   triple    spaces \t\ttabs\n\n \n  \r\n\r\n trailing   ",
    "café cafe\u0301 A\u030angstro\u0308m \u1e9b\u0323 한글 \u1112\u1161\u11ab q\u0323\u0307 \u2126",
    "3.14159 2024年12月 1,000,000 x86_64 ⅷ ½ ٣٤٥ 0xFFFF 1e-10",
    "Ünïcödé straße Привет мир مرحبا बधाई ไทย \x00\x01\x7f <html>&amp;</html>",
)
SPECIAL_TEXTS = (
    "<|im_start|>user\nhi<|im_end|>\n",
    "a<|endoftext|>b <|extra_0|><|extra_204|> <|extra_205|> <|im_end|",
    "  <|im_end|>  \n<|im_end|>",
)


def write(folder, ranks, **files):
    """A tokenizer's folder -> the names of its files."""
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_text("".join(lines))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return [file.name for file in folder.iterdir()]


def converted(folder, ranks):
    """(the fast tokenizer, tiktoken's own encoding)."""
    files = convert_vocabulary(folder, write(folder, ranks))
    special = {token: len(ranks) + at for at, token in enumerate(SPECIAL_TOKENS)}
    qwen = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special)
    return Tokenizer.from_str(files["tokenizer.json"].decode()), qwen


def qwen_ids(qwen, text):
    """As QWenTokenizer.tokenize does it."""
    return qwen.encode(unicodedata.normalize("NFC", text), allowed_special="all", disallowed_special=())


@pytest.fixture(scope="module")
def trained():
    """(ranks, merges) of a small vocabulary, trained as Qwen's was: BPE on the bytes of split pieces."""
    pieces = Counter(regex.findall(SPLIT, unicodedata.normalize("NFC", "".join(CORPUS))))
    words = {tuple(bytes([byte]) for byte in piece.encode()): count for piece, count in pieces.items()}
    ranks = {bytes([byte]): rank for rank, byte in enumerate([*range(33, 256), *range(33)])}
    learned = []
    while len(learned) < 250:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        learned.append(best)
        ranks[best[0] + best[1]] = len(ranks)
        words = {merged(word, best): count for word, count in words.items()}
    return ranks, learned


def merged(word, pair):
    parts = []
    for part in word:
        if parts and (parts[-1], part) == pair:
            parts[-1] += part
        else:
            parts.append(part)
    return tuple(parts)


# Ids


@pytest.mark.parametrize("text", [*CORPUS, *SPECIAL_TEXTS, ""])
def test_every_text_gets_the_ids_that_tiktoken_gives(tmp_path, trained, text):
    fast, qwen = converted(tmp_path, trained[0])
    assert fast.encode(text).ids == qwen_ids(qwen, text)


def test_the_merges_are_those_that_the_vocabulary_was_trained_with(trained):
    ranks, learned = trained
    assert list(merges(ranks)) == learned


@pytest.mark.parametrize("seed", range(20))
def test_a_vocabulary_that_no_training_made_gives_tiktokens_ids_too(tmp_path, seed):
    generator = random.Random(seed)
    words = {"".join(generator.choices("abc", k=generator.randrange(2, 7))).encode() for _ in range(120)}
    tokens = [bytes([byte]) for byte in range(256)] + sorted(words)
    generator.shuffle(tokens)
    fast, qwen = converted(tmp_path, {token: rank for rank, token in enumerate(tokens)})
    for _ in range(300):
        text = "".join(generator.choices("abc", k=generator.randrange(1, 20)))
        assert fast.encode(text).ids == qwen_ids(qwen, text), text


def test_composed_and_decomposed_text_get_the_same_ids(tmp_path, trained):
    fast, _ = converted(tmp_path, trained[0])
    assert fast.encode("cafe\u0301").ids == fast.encode("caf\u00e9").ids


def test_a_special_token_in_a_text_is_one_id_after_all_ranks(tmp_path, trained):
    fast, _ = converted(tmp_path, trained[0])
    size = len(trained[0])
    ids = fast.encode("<|endoftext|><|im_start|><|im_end|><|extra_0|><|extra_204|>").ids
    assert ids == [size, size + 1, size + 2, size + 3, size + 207]
    assert fast.get_vocab_size() == size + 208


@pytest.mark.parametrize("text", CORPUS)
def test_ids_decode_to_the_text(tmp_path, trained, text):
    fast, qwen = converted(tmp_path, trained[0])
    ids = fast.encode(text).ids
    assert fast.decode(ids) == qwen.decode(ids) == unicodedata.normalize("NFC", text)


def test_half_a_character_decodes_as_tiktoken_decodes_it(tmp_path, trained):
    fast, qwen = converted(tmp_path, trained[0])
    half = [trained[0][bytes([byte])] for byte in "好".encode()[:2]]
    assert fast.decode(half) == qwen.decode(half) == "\ufffd"


# As transformers reads it


def loaded(folder, ranks, **files):
    from transformers import AutoTokenizer

    out = folder / "out"
    out.mkdir()
    for name, content in convert_vocabulary(folder, write(folder, ranks, **files)).items():
        (out / name).write_bytes(content)
    (out / "config.json").write_text('{"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}')
    return AutoTokenizer.from_pretrained(out, trust_remote_code=False)


def chatml(query, history=(), system="You are a helpful assistant."):
    """The prompt of Qwen v1's chat, written down from what its make_context describes: joined turns."""
    turns = [("system", system)]
    for question, answer in history:
        turns += [("user", question), ("assistant", answer)]
    turns.append(("user", query))
    written = [f"<|im_start|>{role}\n{text}<|im_end|>" for role, text in turns]
    return "\n".join([*written, "<|im_start|>assistant\n"])


def test_transformers_reads_it_without_code_and_gives_tiktokens_ids(tmp_path, trained):
    tokenizer = loaded(tmp_path, trained[0], tokenizer_config={"model_max_length": 8192})
    _, qwen = converted(tmp_path, trained[0])
    for text in (*CORPUS, *SPECIAL_TEXTS):
        assert tokenizer(text)["input_ids"] == qwen_ids(qwen, text)
    assert tokenizer.model_max_length == 8192
    assert len(tokenizer) == len(trained[0]) + 208
    assert (tokenizer.bos_token, tokenizer.pad_token) == (None, "<|endoftext|>")


def test_the_chat_template_writes_what_qwen_v1s_chat_wrote(tmp_path, trained):
    tokenizer = loaded(tmp_path, trained[0], generation_config={"chat_format": "chatml"})
    user, answer = {"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}
    more = {"role": "user", "content": "1+1?"}
    system = {"role": "system", "content": "Answer briefly."}

    def prompt(*messages):
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert prompt(user) == chatml("你好")
    assert prompt(user, answer, more) == chatml("1+1?", [("你好", "你好！")])
    assert prompt(system, user) == chatml("你好", system="Answer briefly.")
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_base_model_ends_with_the_end_of_a_text(tmp_path, trained):
    tokenizer = loaded(tmp_path, trained[0], generation_config={"chat_format": "raw"})
    assert tokenizer.eos_token == "<|endoftext|>"


def test_what_the_tokenizers_own_config_says_is_kept(tmp_path, trained):
    own = {
        "chat_template": "{{ 'mine' }}",
        "eos_token": "<|endoftext|>",
        "pad_token": {"content": "<|extra_0|>"},
    }
    tokenizer = loaded(tmp_path, trained[0], tokenizer_config=own)
    assert tokenizer.chat_template == "{{ 'mine' }}"
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|extra_0|>")


def test_special_tokens_are_skipped_when_asked(tmp_path, trained):
    tokenizer = loaded(tmp_path, trained[0])
    ids = tokenizer("<|im_start|>user\nhi<|im_end|><|extra_7|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\nhi"


def test_the_same_vocabulary_gives_the_same_bytes(tmp_path, trained):
    names = write(tmp_path, trained[0])
    assert convert_vocabulary(tmp_path, names) == convert_vocabulary(tmp_path, names)


# Refused


def refusal(folder, names=("qwen.tiktoken",)):
    with pytest.raises(BadVocabulary) as caught:
        convert_vocabulary(folder, names)
    assert caught.value.exit_code == 42
    return str(caught.value)


def test_a_line_that_is_no_token_is_refused_by_its_number(tmp_path):
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\n\nIg==\n")
    assert "line 3" in refusal(tmp_path)
    (tmp_path / "qwen.tiktoken").write_text("IQ== 0\nI* 1\n")
    assert "line 2" in refusal(tmp_path)


def test_a_vocabulary_that_lacks_bytes_is_refused(tmp_path, trained):
    ranks = {token: rank for token, rank in trained[0].items() if token != b"\xff"}
    write(tmp_path, ranks)
    assert "1 of the 256 bytes" in refusal(tmp_path)
    assert "0xff" in refusal(tmp_path)


def test_a_vocabulary_with_a_hole_is_refused(tmp_path, trained):
    lost = max(trained[0], key=len)
    write(tmp_path, {token: rank for token, rank in trained[0].items() if token != lost})
    assert "do not have the ranks" in refusal(tmp_path)


def test_a_git_lfs_pointer_is_said_to_be_one(tmp_path):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2561218\n"
    (tmp_path / "qwen.tiktoken").write_text(text)
    with pytest.raises(LfsPointer):
        convert_vocabulary(tmp_path, ["qwen.tiktoken"])


def test_a_vocabulary_extended_by_a_second_file_is_refused(tmp_path, trained):
    names = write(tmp_path, trained[0], tokenizer_config={"extra_vocab_file": "more.tiktoken"})
    assert "more.tiktoken" in refusal(tmp_path, names)


def test_a_missing_or_broken_file_is_refused_by_name(tmp_path, trained):
    assert "qwen.tiktoken: cannot be read" in refusal(tmp_path)
    names = write(tmp_path, trained[0], tokenizer_config=["no object"])
    assert "tokenizer_config.json: holds list" in refusal(tmp_path, names)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json: is not valid JSON" in refusal(tmp_path, names)
