"""loader/checkpoint.py, with the headers, files and architectures that it reads through."""

import json
import struct
import subprocess
import sys
import time

import pytest
from safetensors.torch import save_file

from loader.architectures import causal_classes
from loader.checkpoint import DTYPE_BYTES, read
from loader.errors import (
    BadCheckpoint,
    BadHeader,
    BadIndex,
    BadPlanRequest,
    LfsPointer,
    MissingShard,
    NoConfig,
    NotAModel,
    NoWeights,
    PickleWeights,
    QuantizedCheckpoint,
    TruncatedShard,
    UnsupportedModel,
)
from loader.headers import DTYPE_BITS, parse_header

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
WEIGHT = {"model.norm.weight": ("BF16", (16,))}


@pytest.fixture
def tiny(tmp_path, fake_checkpoint, configs):
    return fake_checkpoint(tmp_path / "tiny", configs["tiny"])


@pytest.fixture
def sharded(tmp_path, fake_checkpoint, configs):
    return fake_checkpoint(tmp_path / "sharded", configs["tiny"], shards=3)


def write_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def write_header(file, header, data_bytes=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data_bytes))


def refusal(folder, kind, *words):
    """The message of the error, which must be of exactly that type."""
    with pytest.raises(kind) as caught:
        read(folder)
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)
    return caught.value


# What is read


def test_a_single_file_is_read_with_the_place_of_every_tensor(tmp_path, configs):
    import torch

    tensors = {"model.norm.weight": torch.arange(16.0), "lm_head.weight": torch.ones(4, 4).bfloat16()}
    (tmp_path / "config.json").write_text(json.dumps(configs["tiny"]))
    save_file(tensors, tmp_path / "model.safetensors")

    spec = read(tmp_path)

    raw = (tmp_path / "model.safetensors").read_bytes()
    found = {t.name: t for t in spec.tensors}
    assert {n: (t.dtype, t.shape, t.n_bytes, t.file) for n, t in found.items()} == {
        "model.norm.weight": ("F32", (16,), 64, "model.safetensors"),
        "lm_head.weight": ("BF16", (4, 4), 32, "model.safetensors"),
    }
    norm = found["model.norm.weight"]
    assert struct.unpack("<16f", raw[norm.start : norm.end]) == tuple(range(16))
    assert spec.path == tmp_path
    assert spec.source == str(tmp_path)
    assert spec.model_type == "qwen2"
    assert spec.file_bytes == 96


def test_a_sharded_model_reads_as_the_same_tensors_as_a_single_file(tiny, sharded):
    one, many = read(tiny), read(sharded)
    assert {(t.name, t.dtype, t.shape) for t in one.tensors} == {
        (t.name, t.dtype, t.shape) for t in many.tensors
    }
    assert len({t.file for t in many.tensors}) == 3
    assert one.file_bytes == many.file_bytes


def test_tied_weights_are_read_as_the_file_has_them(tiny):
    names = {t.name for t in read(tiny).tensors}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_numbered_shards_without_an_index_are_read(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    assert len({t.file for t in read(sharded).tensors}) == 3


def test_a_second_copy_of_the_weights_in_mistrals_form_is_left_alone(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "consolidated.safetensors").write_bytes(b"not even read")
    assert len({t.file for t in read(sharded).tensors}) == 3


def test_generation_config_comes_along(tiny):
    assert read(tiny).generation_config == {}
    (tiny / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert read(tiny).generation_config == {"eos_token_id": [1, 2]}


@pytest.mark.parametrize("dtype", sorted(set(DTYPE_BITS) - {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0"}))
def test_every_whole_byte_dtype_is_read(tmp_path, fake_checkpoint, configs, dtype):
    folder = fake_checkpoint(tmp_path, configs["tiny"], {"a": (dtype, (3, 5))})
    assert read(folder).tensors[0].n_bytes == 15 * DTYPE_BYTES[dtype]


def test_the_dtypes_are_those_that_safetensors_knows():
    from safetensors import deserialize

    def accepts(dtype, n_bytes):
        text = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, n_bytes]}}).encode()
        deserialize(struct.pack("<Q", len(text)) + text + bytes(n_bytes))

    for dtype, bits in DTYPE_BITS.items():
        accepts(dtype, bits)  # 8 elements
    with pytest.raises(Exception, match="expected one of") as caught:
        accepts("NONE", 8)
    known = str(caught.value).split("expected one of ")[1].split(" at line")[0]
    assert {name.strip("` ") for name in known.split(",")} == set(DTYPE_BITS)


def test_scalars_and_empty_tensors_are_read(tmp_path, fake_checkpoint, configs):
    folder = fake_checkpoint(tmp_path, configs["tiny"], {"a": ("F32", ()), "b": ("BF16", (0, 4))})
    assert [(t.name, t.n_bytes) for t in read(folder).tensors] == [("a", 4), ("b", 0)]


def test_a_70bs_headers_take_less_than_a_fifth_of_a_second(tmp_path, fake_checkpoint, configs):
    folder = fake_checkpoint(tmp_path, configs["llama3-70b"], shards=30)
    read(folder)  # the first time also parses transformers' list of models
    started = time.perf_counter()
    spec = read(folder)
    seconds = time.perf_counter() - started
    assert len(spec.tensors) == 723
    assert spec.file_bytes == 141_107_412_992
    assert seconds < 0.2


def test_reading_imports_neither_torch_nor_transformers(tiny):
    code = (
        "import sys; from loader import budget, checkpoint, hub, probe; probe.machine(); "
        f"checkpoint.read({str(tiny)!r}); "
        "heavy = {'torch', 'transformers', 'accelerate', 'numpy', 'huggingface_hub'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


# Where it is


def test_a_path_that_is_not_there_is_no_hub_id(tmp_path):
    for source in ("./nope", str(tmp_path / "nope"), "../a/b", "nope", "a/b/c", "C:\\models\\nope", "-x/y"):
        refusal(source, NotAModel, source, "no such folder", "owner/name")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("model.gguf", "GGUF"),
        ("model.safetensors", "Give its folder"),
        ("model.txt", "Give a model's folder"),
    ],
)
def test_a_file_instead_of_a_folder_is_refused_with_what_to_give(tmp_path, name, advice):
    (tmp_path / name).write_bytes(b"GGUF")
    refusal(tmp_path / name, NotAModel, advice)


def test_a_revision_of_a_folder_is_refused(tiny):
    with pytest.raises(BadPlanRequest, match="v1"):
        read(tiny, revision="v1")


# config.json


def test_an_empty_folder_is_refused(tmp_path):
    refusal(tmp_path, NoConfig, "empty")


def test_weights_without_a_config_are_refused(tiny):
    (tiny / "config.json").unlink()
    refusal(tiny, NoConfig, "there is no config.json")


def test_an_adapter_is_refused_with_the_command_that_merges_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refusal(tmp_path, NoConfig, f"snugfit export --base BASE --adapter {tmp_path}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": NaN', "\xff\xfe", "[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(tiny, text):
    (tiny / "config.json").write_text(text, encoding="latin-1")
    refusal(tiny, NoConfig, "config.json")


@pytest.mark.parametrize("name", ["generation_config.json", "model.safetensors.index.json"])
def test_broken_json_beside_the_config_is_named(sharded, name):
    (sharded / name).write_text("{")
    refusal(sharded, NoConfig, name)


# The architecture


def test_the_list_of_architectures_is_that_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert causal_classes() == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "nonesuch"}, ("does not know it", "transformers 5")),
        (
            {"model_type": "nonesuch", "auto_map": {"AutoModelForCausalLM": "m.M"}},
            ("trust_remote_code is off",),
        ),
        ({"model_type": "t5", "is_encoder_decoder": True}, ("encoder-decoder",)),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, ("not as a causal",)),
        ({"model_type": "bart", "architectures": ["BartForConditionalGeneration"]}, ("encoder-decoder",)),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, ("an encoder",)),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"]}, ("lacks the head",)),
        ({"model_type": "qwen2", "architectures": ["Qwen2Model"]}, ("Qwen2Model",)),
        ({"model_type": "clip", "architectures": ["CLIPModel"]}, ("not as a causal",)),
        ({"model_type": None}, ("model_type",)),
        ({"model_type": 7}, ("model_type",)),
    ],
)
def test_a_model_that_cannot_be_served_is_refused_with_the_reason(tiny, changes, words):
    write_config(tiny, **changes)
    refusal(tiny, UnsupportedModel, *words)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": None},
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"},
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
        {"model_type": "bert", "is_decoder": True, "architectures": ["BertLMHeadModel"]},
        {"auto_map": {"AutoModelForCausalLM": "m.M"}},  # transformers knows the type: its own class is used
    ],
)
def test_a_causal_model_is_read_however_it_is_called(tiny, changes):
    write_config(tiny, **changes)
    assert read(tiny).tensors


# Shards


def test_a_config_without_weights_is_refused(tiny):
    (tiny / "model.safetensors").unlink()
    refusal(tiny, NoWeights, "no *.safetensors")
    (tiny / "m-q4.gguf").write_bytes(b"GGUF")
    refusal(tiny, NoWeights, "m-q4.gguf is GGUF")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickles_are_refused_with_how_to_convert_them(tiny, name):
    (tiny / "model.safetensors").unlink()
    (tiny / name).write_bytes(b"\x80\x02")
    refusal(tiny, PickleWeights, name, "save_pretrained")


def test_pickles_beside_safetensors_are_left_alone(tiny):
    (tiny / "pytorch_model.bin").write_bytes(b"\x80\x02")
    assert read(tiny).tensors


def test_a_single_file_goes_before_an_index_as_in_transformers(tiny):
    (tiny / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert {t.file for t in read(tiny).tensors} == {"model.safetensors"}


def test_a_missing_shard_is_not_blamed_on_pickles_that_lie_beside_it(sharded):
    (sharded / "pytorch_model.bin").write_bytes(b"\x80\x02")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refusal(sharded, MissingShard, "1 of 3")


def test_missing_shards_are_named_with_how_many_there_should_be(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    error = refusal(sharded, MissingShard, "1 of 3", "model-00002-of-00003.safetensors")
    assert error.missing == ("model-00002-of-00003.safetensors",)


def test_without_an_index_the_numbering_shows_what_is_missing(sharded):
    (sharded / "model.safetensors.index.json").unlink()
    (sharded / "model-00003-of-00003.safetensors").unlink()
    refusal(sharded, MissingShard, "model-00003-of-00003.safetensors")


@pytest.mark.parametrize("change", [-1, 1, -20])
def test_a_truncated_shard_is_refused_with_both_sizes(tiny, change):
    file = tiny / "model.safetensors"
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size + change)
    error = refusal(tiny, TruncatedShard, f"{size:,}", f"{size + change:,}")
    assert (error.expected_bytes, error.actual_bytes) == (size, size + change)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors", "tokenizer.json"],
)
def test_a_git_lfs_pointer_is_refused_with_the_size_of_the_real_file(sharded, name):
    (sharded / name).write_text(POINTER)
    error = refusal(sharded, LfsPointer, name, "git lfs pull")
    assert error.real_bytes == 4_976_698_672


def test_the_index_must_name_files_of_this_folder(sharded):
    index = {"weight_map": {"a": "../../etc/passwd.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(sharded, BadIndex, "passwd")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_refused(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refusal(sharded, BadIndex)


def test_an_index_that_names_tensors_the_shard_lacks_is_refused(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    refusal(sharded, BadIndex, "1 tensors", "model.extra.weight", "model-00001-of-00003.safetensors")


def test_an_index_that_names_the_wrong_shard_is_refused(sharded):
    file = sharded / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00003.safetensors"
    file.write_text(json.dumps(index))
    refusal(sharded, BadIndex, "model.norm.weight is not in model-00001-of-00003.safetensors")


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, second = sharded / "model-00001-of-00003.safetensors", sharded / "model-00002-of-00003.safetensors"
    second.write_bytes(first.read_bytes())
    refusal(sharded, BadIndex, "two models", first.name, second.name)


# Headers


def entry(dtype="F32", shape=(4,), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "word"),
    [
        (b"{", "not JSON"),
        (b"\xff\xff", "not JSON"),
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        ({"a": 1}, "no dtype"),
        ({"a": entry(dtype="F128")}, "F128"),
        ({"a": entry(dtype=None)}, "None"),
        ({"a": entry(dtype=["F32"])}, "F32"),
        ({"a": entry(shape=[-4])}, "-4"),
        ({"a": entry(shape=[4.0])}, "4.0"),
        ({"a": entry(shape=[True])}, "True"),
        ({"a": entry(shape=None)}, "None"),
        ({"a": entry(offsets=[16, 0])}, "16, 0"),
        ({"a": entry(offsets=[0])}, "[0]"),
        ({"a": entry(offsets=[0, 12])}, "takes 16 bytes and has 12"),
        ({"a": entry(dtype="F4", shape=[3], offsets=[0, 2])}, "takes 1.5 bytes"),
        ({"a": entry(), "b": entry(offsets=[8, 24])}, "data at 8"),
        ({"a": entry(), "b": entry(offsets=[20, 36])}, "data at 20"),
        ({"a": entry(offsets=[16, 32])}, "data at 16"),
    ],
)
def test_a_bad_header_is_refused_with_the_reason(tiny, header, word):
    write_header(tiny / "model.safetensors", header, 16)
    refusal(tiny, BadHeader, word)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "0 bytes"),
        (b"\x10\x00\x00", "3 bytes"),
        (struct.pack("<Q", 1000) + b"{}", "1,000 bytes in a file of 10"),
        (struct.pack("<Q", 100_000_001) + b"{}", "100,000,001"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", "torch.save"),
        (b"GGUF\x03\x00\x00\x00\x23\x01", "GGUF"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b'{"a": {"dtype": "F32"}}', "JSON without"),
    ],
)
def test_what_is_no_safetensors_file_is_refused_as_what_it_is(tiny, content, word):
    (tiny / "model.safetensors").write_bytes(content)
    refusal(tiny, BadHeader, "model.safetensors", word)


def test_metadata_is_no_tensor():
    assert parse_header(b'{"__metadata__": {"format": "pt"}}', "f", 8 + 34, "f") == []


# Quantized checkpoints


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq, 4 bits"),
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes, 4 bits",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "mxfp4"}}}, "mxfp4"),
        ({"quantization_config": "yes"}, "unknown method"),
    ],
)
def test_a_quantized_config_is_refused_with_the_export_command(tiny, changes, method):
    write_config(tiny, **changes)
    refusal(tiny, QuantizedCheckpoint, method, f"snugfit export --base {tiny}")


@pytest.mark.parametrize(
    "suffix", ["qweight", "qzeros", "weight.absmax", "SCB", "weight_packed", "weight_scale_inv"]
)
def test_quantized_tensors_are_found_without_a_word_in_the_config(tmp_path, fake_checkpoint, configs, suffix):
    name = f"model.layers.0.mlp.up_proj.{suffix}"
    folder = fake_checkpoint(tmp_path, configs["tiny"], {**WEIGHT, name: ("I32", (4, 4))})
    refusal(folder, QuantizedCheckpoint, name)


def test_tensors_of_less_than_a_byte_are_quantized(tmp_path, fake_checkpoint, configs):
    folder = fake_checkpoint(tmp_path, configs["tiny"], {**WEIGHT, "a": ("F4", (4, 4))})
    refusal(folder, QuantizedCheckpoint, "a is F4")


def test_every_refusal_ends_the_command_as_bad_input():
    kinds = [NotAModel, NoConfig, NoWeights, BadIndex, BadHeader, TruncatedShard, LfsPointer, MissingShard]
    assert all(issubclass(kind, BadCheckpoint) for kind in kinds)
    assert BadCheckpoint.exit_code == 42
