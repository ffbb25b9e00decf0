"""exporter/quantization/config_groups.py: which layer was quantized how, as the library looks it up."""

import pytest
from compressed_tensors.config import CompressionFormat

from exporter.errors import BadQuantization
from exporter.quantization.config_groups import FORMATS, NO_FORMAT, scheme_of, schemes

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel"}


def config(**groups):
    """A group's name -> (targets, arguments of its weights)"""
    found = {name: {"targets": targets, "weights": weights} for name, (targets, weights) in groups.items()}
    return {"format": "pack-quantized", "config_groups": found}


def one(**changes):
    return config(group=(["Linear"], {**INT4, **changes}))


def kind_of(module, **groups):
    return scheme_of("base", module, schemes("base", config(**groups))).kind


def test_a_name_goes_before_a_pattern_and_a_pattern_before_a_class():
    groups = {
        "classes": (["Linear"], INT4),
        "patterns": (["re:.*attn.*"], FP8),
        "names": (["l.0.attn.o", "l.1.mlp"], INT4),
    }
    assert kind_of("l.0.mlp", **groups) == "int"
    assert kind_of("l.0.attn.q", **groups) == "float"
    assert kind_of("l.0.attn.o", **groups) == "int"


def test_a_pattern_begins_at_the_first_letter_as_in_the_library():
    groups = {"patterns": (["re:attn"], FP8), "classes": (["Linear"], INT4)}
    assert kind_of("attn.q", **groups) == "float"
    assert kind_of("l.0.attn.q", **groups) == "int"


def test_an_embedding_is_known_by_its_name():
    groups = {"a": (["Linear"], INT4), "b": (["Embedding"], FP8)}
    assert kind_of("model.embed_tokens", **groups) == "float"
    assert kind_of("model.embed_tokens.proj", **groups) == "int"


def test_a_layer_no_target_means_is_read_when_there_is_one_way_only():
    assert kind_of("model.layers.0.q", a=(["language_model.layers.0.q"], FP8)) == "float"


def test_a_layer_no_target_means_is_refused_when_there_are_two_ways():
    groups = {"a": (["x"], FP8), "b": (["re:y.*"], INT4)}
    with pytest.raises(BadQuantization, match=r"l\.0\.q is quantized .* \(x, re:y\.\*\)"):
        kind_of("l.0.q", **groups)


def test_a_group_that_quantizes_no_weights_is_none():
    assert schemes("base", config(a=(["Linear"], None))) == ()


@pytest.mark.parametrize(
    ("arguments", "strategy", "block"),
    [
        ({"strategy": None}, "group", (1, 128)),
        ({"strategy": None, "group_size": -1}, "channel", (1, 64)),
        ({"strategy": None, "group_size": None}, "tensor", (32, 64)),
        ({"strategy": "channel"}, "channel", (1, 64)),
        ({"strategy": "block", "block_structure": [8, 16]}, "block", (8, 16)),
        ({"strategy": "block", "block_structure": "8x16"}, "block", (8, 16)),
    ],
)
def test_a_strategy_says_what_shares_a_scale(arguments, strategy, block):
    (scheme,) = schemes("base", one(**arguments))
    assert scheme.strategy == strategy
    assert scheme.block((32, 64)) == block


def test_configs_of_the_first_releases_are_one_level_deeper():
    outer = {"sparsity_config": {"format": "dense"}, "quantization_config": one()}
    assert len(schemes("base", outer)) == 1


OTHERS = sorted({str(f.value) for f in CompressionFormat} - {*FORMATS, *NO_FORMAT})


def test_the_library_has_formats_that_are_not_read():
    assert "nvfp4-pack-quantized" in OTHERS
    assert "marlin-24" in OTHERS


@pytest.mark.parametrize("layout", OTHERS)
def test_other_formats_are_refused_by_name(layout):
    with pytest.raises(BadQuantization, match=f"format '{layout}'"):
        schemes("base", one() | {"format": layout})
    group = {"targets": ["Linear"], "weights": FP8, "format": layout}
    with pytest.raises(BadQuantization, match=f"format '{layout}'"):
        schemes("base", {"format": "mixed-precision", "config_groups": {"a": group}})


def test_sparse_weights_are_refused_by_name():
    with pytest.raises(BadQuantization, match="sparse-24-bitmask"):
        schemes("base", one() | {"sparsity_config": {"format": "sparse-24-bitmask"}})


def test_dense_sparsity_and_empty_transforms_are_nothing():
    assert schemes("base", one() | {"sparsity_config": {"format": "dense"}, "transform_config": {}})


def test_rotated_weights_are_refused():
    rotated = {"transform_config": {"config_groups": {"R1": {"type": "hadamard"}}}}
    with pytest.raises(BadQuantization, match="transform_config"):
        schemes("base", one() | rotated)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "pack-quantized"}, "no config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "no config_groups"),
        ({"config_groups": {"a": {"weights": INT4}}}, "'a' has no targets"),
        ({"config_groups": {"a": {"weights": "W4A16", "targets": []}}}, "'a' has no targets"),
        (one(num_bits=4, type="float"), "4-bit float"),
        (one(num_bits=16), "16-bit int"),
        (one(num_bits="4"), "4-bit int"),
        (one(group_size=0), r"strategy 'group' with group_size 0"),
        (one(strategy="tensor_group"), "strategy 'tensor_group'"),
        (one(strategy="block", block_structure=[128]), r"block_structure \[128\]"),
        (one(strategy="block", block_structure="128xy"), "block_structure '128xy'"),
        (one(strategy="block", block_structure=[0, 1]), r"block_structure \[0, 1\]"),
        (one(strategy=["group"]), "strategy"),
    ],
)
def test_groups_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(BadQuantization, match=message):
        schemes("base", settings)


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(BadQuantization, match=r"'re:\*' is no pattern"):
        kind_of("a", a=(["re:*"], INT4))
