"""Which tensor goes into which file, and the headers; the oracles are safetensors and huggingface_hub."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open

from exporter import shards
from exporter.recipe import Recipe
from exporter.weights import Plain, Stored
from loader.files import read_header
from loader.headers import TensorInfo

LAYER = {"input_layernorm.weight": (8,), "mlp.up_proj.weight": (32, 8), "self_attn.q_proj.weight": (8, 8)}


def recipe(name, shape, dtype="F32"):
    return Recipe(name, shape, Plain(name, Stored(TensorInfo(name, dtype, shape, "f", 0, 0), None)))


def model(layers=11):
    names = [(f"model.layers.{n}.{name}", shape) for n in range(layers) for name, shape in LAYER.items()]
    ends = [("lm_head.weight", (64, 8)), ("model.embed_tokens.weight", (64, 8)), ("model.norm.weight", (8,))]
    return [recipe(name, shape) for name, shape in [*ends, *names]]


def test_tensors_stand_in_the_order_in_which_a_forward_meets_them():
    names = [r.name for r in shards.in_layer_order(model())]
    assert names[0] == "model.embed_tokens.weight"
    assert names[-2:] == ["lm_head.weight", "model.norm.weight"]
    numbers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert numbers == sorted(numbers)  # 2 before 10


def test_every_float_becomes_bf16_and_integers_stay():
    assert [shards.output_dtype(recipe("a", (1,), d)) for d in ("F32", "F16", "F64", "I64", "BOOL")] == [
        "BF16", "BF16", "BF16", "I64", "BOOL",
    ]  # fmt: skip


def test_a_layer_is_in_one_file_where_it_fits():
    layer_bytes = 2 * (8 + 32 * 8 + 8 * 8)
    packed = shards.pack(shards.in_layer_order(model()), 2 * layer_bytes + 100)
    for n in range(11):
        files = {s.file for s in packed for r in s.recipes if r.name.startswith(f"model.layers.{n}.")}
        assert len(files) == 1


@pytest.mark.parametrize("shard_bytes", [100, 512, 700, 1500, 10**6])
def test_no_file_is_larger_than_asked_unless_one_tensor_is(shard_bytes):
    packed = shards.pack(shards.in_layer_order(model()), shard_bytes)
    for shard in packed:
        size = sum(shards.output_bytes(r) for r in shard.recipes)
        assert size <= shard_bytes or len(shard.recipes) == 1
    assert sum(len(s.recipes) for s in packed) == len(model())


def test_one_file_has_no_number_and_no_index():
    packed = shards.pack(model(), 10**9)
    assert [s.file for s in packed] == ["model.safetensors"]
    assert shards.index(packed) == {}


def test_names_and_index_are_those_of_the_hub():
    recipes = shards.in_layer_order(model())
    tensors = {r.name: torch.empty(r.shape, dtype=torch.bfloat16) for r in recipes}
    packed = shards.pack(recipes, 700)
    ours = json.loads(shards.index(packed)["model.safetensors.index.json"])
    theirs = split_torch_state_dict_into_shards(
        tensors, max_shard_size=700, filename_pattern="model{suffix}.safetensors"
    )
    assert ours["metadata"]["total_size"] == theirs.metadata["total_size"]
    assert ours["metadata"]["total_parameters"] == sum(t.numel() for t in tensors.values())
    assert list(ours["weight_map"]) == sorted(tensors)
    assert packed[0].file == f"model-00001-of-{len(packed):05d}.safetensors"


def test_safetensors_reads_the_header_and_the_data_begins_at_a_page(tmp_path):
    (shard,) = shards.pack(shards.in_layer_order(model(2)), 10**9)
    file = tmp_path / shard.file
    file.write_bytes(shard.header + bytes(shard.n_bytes - len(shard.header)))
    assert len(shard.header) % shards.ALIGNMENT_BYTES == 0
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for made in shard.recipes:
            assert tuple(opened.get_slice(made.name).get_shape()) == made.shape
    in_file = [info.name for info in read_header(file)]  # in the order of the data
    assert in_file == [r.name for r in shard.recipes]


def test_a_name_in_another_script_is_kept(tmp_path):
    (shard,) = shards.pack([recipe("模型.weight", (2, 2))], 10**9)
    Path(tmp_path / "m.safetensors").write_bytes(shard.header + bytes(8))
    assert read_header(tmp_path / "m.safetensors")[0].name == "模型.weight"
