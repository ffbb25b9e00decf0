"""loader/weights.py: every tensor of a checkpoint finds its parameter, as in from_pretrained."""

import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from loader import checkpoint
from loader.errors import TensorMismatch, TiedWeightsDiffer
from loader.shards import ShardReader
from loader.weights import CheckpointWeights, find_sources

FILE = "model.safetensors"
SMALL = {
    "vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# Twelve experts, so that their order as text (10 before 2) would be wrong.
MOES = {
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 4},
    "mixtral": {"num_local_experts": 12, "num_experts_per_tok": 2},
}
EXPERT = {
    "qwen3_moe": "model.layers.1.mlp.experts.{}.{}_proj.weight",
    "mixtral": "model.layers.1.block_sparse_moe.experts.{}.{}.weight",
}
GATE = {"qwen3_moe": "gate", "mixtral": "w1"}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def saved(tmp_path):
    """`saved("llama", …)`: a folder that save_pretrained wrote, with random weights."""

    def save(family="llama", shard_bytes=10**9, **more):
        torch.manual_seed(3)
        config = AutoConfig.for_model(family, **(SMALL | more))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(tmp_path, max_shard_size=shard_bytes)
        return tmp_path

    return save


@pytest.fixture
def weights_of():
    """The checkpoint as parameters of the model that transformers builds for it."""
    opened = []

    def open_weights(folder, dtype=torch.float32):
        model = skeleton(folder)
        dtypes = dict.fromkeys(model.state_dict(), dtype)
        opened.append(CheckpointWeights(checkpoint.read(folder), folder, model, dtypes))
        return opened[-1]

    yield open_weights
    for weights in opened:
        weights.close()


def skeleton(folder):
    """The model without memory."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    model.tie_weights()
    return model


def sources_of(folder):
    model = skeleton(folder)
    return find_sources(
        checkpoint.read(folder), model, {name: t.shape for name, t in model.state_dict().items()}
    )


def rewrite(folder, change):
    """Save the tensors again after `change(tensors)` has changed the dict."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def refused(folder):
    with pytest.raises(TensorMismatch) as caught:
        sources_of(folder)
    return caught.value


def expected_parameters(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def assert_reads_as_transformers(weights, folder):
    expected = expected_parameters(folder)
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


# What does not match


def test_missing_tensors_are_named(saved):
    gone = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    error = refused(rewrite(saved(), lambda tensors: [tensors.pop(name) for name in gone]))
    assert (error.missing, error.unexpected, error.wrong) == (tuple(gone), (), ())
    assert all(name in str(error) for name in gone)


def test_an_untied_head_must_be_there(saved):
    assert refused(rewrite(saved(), lambda tensors: tensors.pop(HEAD))).missing == (HEAD,)


def test_tensors_that_the_architecture_lacks_are_named(saved):
    extra = {
        "model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(24, 16),  # there are two layers
        "score.weight": torch.zeros(2, 16),
    }
    error = refused(rewrite(saved(), lambda tensors: tensors.update(extra)))
    assert (error.missing, set(error.unexpected), error.wrong) == ((), set(extra), ())
    assert all(name in str(error) for name in extra)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved):
    name = "model.layers.1.mlp.down_proj.weight"
    error = refused(rewrite(saved(), lambda tensors: tensors.update({name: torch.zeros(16, 23)})))
    assert error.wrong == (f"{name}: [16, 23] in the file, [16, 24] in the model",)
    assert error.wrong[0] in str(error)


def test_a_transposed_tensor_is_another_shape(saved):
    name = "model.layers.0.mlp.up_proj.weight"

    def transpose(tensors):
        tensors[name] = tensors[name].t().contiguous()

    assert refused(rewrite(saved(), transpose)).wrong == (
        f"{name}: [16, 24] in the file, [24, 16] in the model",
    )


def test_all_that_is_wrong_is_told_at_once(saved):
    def break_it(tensors):
        del tensors["model.norm.weight"]
        tensors["model.norm.bias"] = torch.zeros(16)
        tensors[EMBEDDING] = torch.zeros(61, 16)

    error = refused(rewrite(saved(), break_it))
    assert error.missing == ("model.norm.weight",)
    assert error.unexpected == ("model.norm.bias",)
    assert error.wrong == (f"{EMBEDDING}: [61, 16] in the file, [60, 16] in the model",)


@pytest.mark.parametrize("family", MOES)
def test_a_layer_that_lacks_an_expert_is_named(saved, family):
    gone = [
        EXPERT[family].format(11, part)
        for part in (("gate", "up") if family == "qwen3_moe" else ("w1", "w3"))
    ]
    folder = rewrite(saved(family, **MOES[family]), lambda tensors: [tensors.pop(name) for name in gone])
    error = refused(folder)
    assert (error.missing, error.unexpected, len(error.wrong)) == ((), (), 1)
    assert error.wrong[0].startswith("model.layers.1.mlp.experts.gate_up_proj: [11, ")


@pytest.mark.parametrize("family", MOES)
def test_a_lone_expert_of_another_shape_is_named(saved, family):
    name = EXPERT[family].format(7, GATE[family])

    def widen(tensors):
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows + 2, columns)

    error = refused(rewrite(saved(family, **MOES[family]), widen))
    assert [text.split(":")[0] for text in error.wrong] == ["model.layers.1.mlp.experts.gate_up_proj"]


# Names


@pytest.mark.parametrize(
    "kept", [(EMBEDDING,), (HEAD,), (EMBEDDING, HEAD)], ids=["embedding", "head", "both"]
)
def test_a_tied_matrix_is_read_once_whichever_name_the_file_has(saved, weights_of, kept):
    def keep(tensors):
        matrix = tensors.pop(EMBEDDING)
        tensors.update({name: matrix.clone() for name in kept})

    folder = rewrite(saved("qwen2", tie_word_embeddings=True), keep)
    sources = sources_of(folder)
    assert HEAD not in sources
    assert [info.name for info in sources[EMBEDDING].tensors()] == [kept[0]]
    assert_reads_as_transformers(weights_of(folder), folder)


def test_two_tied_matrices_that_differ_are_refused(saved):
    def add_another(tensors):
        tensors[HEAD] = tensors[EMBEDDING] * 2

    folder = rewrite(saved("qwen2", tie_word_embeddings=True), add_another)
    model = skeleton(folder)
    with pytest.raises(TiedWeightsDiffer, match=r"embed_tokens\.weight and lm_head\.weight are one"):
        CheckpointWeights(checkpoint.read(folder), folder, model, {}).refuse_different_copies()


def test_rotary_tables_of_old_llama_checkpoints_are_left_out(saved, weights_of):
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(2)}
    folder = rewrite(saved(), lambda tensors: tensors.update(tables))
    assert_reads_as_transformers(weights_of(folder), folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_names_without_the_prefix_of_the_base_model_are_understood(saved, weights_of, tied):
    folder = saved("qwen2", tie_word_embeddings=tied)
    expected = {name: tensor.clone() for name, tensor in expected_parameters(folder).items()}

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    weights = weights_of(rewrite(folder, strip))
    assert not any(name.startswith("model.") for name in load_file(folder / FILE))
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", ["llama", "phi3", "phi", "gemma2"])
def test_parameters_are_those_of_from_pretrained(saved, weights_of, family):
    folder = saved(family)
    assert_reads_as_transformers(weights_of(folder), folder)


def test_a_fused_projection_stays_one_tensor(saved):
    source = sources_of(saved("phi3"))["model.layers.0.self_attn.qkv_proj.weight"]
    assert (source.converter, len(list(source.tensors()))) == (None, 1)


# Conversions


@pytest.mark.parametrize("shard_bytes", [10**9, 8000], ids=["one shard", "many shards"])
@pytest.mark.parametrize("family", MOES)
def test_experts_are_put_in_their_places_without_another_copy(
    saved, weights_of, monkeypatch, family, shard_bytes
):
    folder = saved(family, shard_bytes, **MOES[family])
    monkeypatch.delattr(CheckpointWeights, "_converted")
    assert (len(list(folder.glob("*.safetensors"))) > 5) == (shard_bytes < 10**9)
    assert_reads_as_transformers(weights_of(folder), folder)


@pytest.mark.parametrize("family", MOES)
def test_experts_are_cast_on_their_way(saved, weights_of, family):
    folder = saved(family, **MOES[family])
    weights = weights_of(folder, torch.bfloat16)
    for name, tensor in expected_parameters(folder).items():
        assert torch.equal(weights[name], tensor.bfloat16()), name


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("hrm_text", {"head_dim": 4, "num_hidden_layers": 1}),  # one tensor of the file is four parameters
        ("olmo_hybrid", {"layer_types": ["linear_attention", "full_attention"]}),  # three are one
    ],
)
def test_rarer_conversions_go_through_transformers_own(saved, weights_of, family, more):
    folder = saved(family, **more)
    assert any(source.converter for source in sources_of(folder).values())
    assert_reads_as_transformers(weights_of(folder), folder)


# As a mapping


def test_asking_whether_a_parameter_is_there_reads_nothing(saved, weights_of, monkeypatch):
    weights = weights_of(saved())
    monkeypatch.delattr(ShardReader, "read_into")
    assert HEAD in weights
    assert "model.embed_tokens" not in weights
    assert len(weights) == len(list(weights)) == 2 * 9 + 3


def test_every_reading_is_new_memory(saved, weights_of):
    weights = weights_of(saved())
    first, second = weights[HEAD], weights[HEAD]
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, second)


def test_a_disk_is_read_from_front_to_back(saved, weights_of):
    folder = saved("qwen2", shard_bytes=8000)
    weights = weights_of(folder)
    order = weights.in_file_order()
    assert sorted(order) == sorted(weights)
    where = {info.name: (info.file, info.start) for info in checkpoint.read(folder).tensors}
    assert len({file for file, _ in where.values()}) > 2
    assert [where[name] for name in order] == sorted(where.values())


def test_what_is_closed_lets_go_of_the_model(saved):
    folder = saved()
    model = skeleton(folder)
    alive = weakref.ref(model)
    weights = CheckpointWeights(checkpoint.read(folder), folder, model, dict.fromkeys(model.state_dict()))
    weights.close()
    del model
    gc.collect()
    assert alive() is None
