"""loader/device_map.py: a placement in accelerate's form."""

import warnings

import pytest
import torch
from accelerate.utils import check_device_map
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from loader.device_map import accelerate_device, device_map

DEVICES = ("cuda:0", "cuda:1", "cpu", "disk")
MLP = ("gate_proj", "up_proj", "down_proj")
MODULES = 2 * 11 + 4  # of a Qwen3 with two layers


def layer(number, attention, mlp):
    """Places of one layer's modules; its norms stay with attention."""
    at = f"model.layers.{number}"
    return {
        f"{at}.input_layernorm": attention,
        f"{at}.self_attn.q_proj": attention,
        f"{at}.self_attn.o_proj": attention,
        f"{at}.post_attention_layernorm": attention,
        **{f"{at}.mlp.{name}": mlp for name in MLP},
    }


def device_of(module, entries):
    """As accelerate resolves a module: the entry of its nearest ancestor."""
    while module not in entries:
        module, dot, _ = module.rpartition(".")
        if not dot:
            return entries[""]
    return entries[module]


@pytest.fixture(scope="module")
def model():
    """A real model on meta, and the modules of it that own anything."""
    sizes = {"vocab_size": 72, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = AutoConfig.for_model("qwen3", **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    owners = [
        name
        for name, module in model.named_modules()
        if [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    ]
    assert len(owners) == MODULES
    return model, owners


@pytest.mark.parametrize(
    ("device", "theirs"), [("cuda:0", 0), ("cuda:12", 12), ("cpu", "cpu"), ("disk", "disk")]
)
def test_gpus_are_numbers_and_other_places_are_names(device, theirs):
    assert accelerate_device(device) == theirs


@pytest.mark.parametrize(("device", "theirs"), [("cuda:1", 1), ("cpu", "cpu")])
def test_a_model_on_one_device_is_one_entry(device, theirs):
    places = {"model.embed_tokens": device, **layer(0, device, device), "lm_head": device}
    assert device_map(places) == {"": theirs}


def test_a_layer_on_one_device_is_one_entry():
    places = {
        "model.embed_tokens": "cuda:0", **layer(0, "cuda:0", "cuda:0"), **layer(1, "cuda:1", "cuda:1"),
        "model.norm": "cuda:1", "lm_head": "cuda:1",
    }  # fmt: skip
    assert device_map(places) == {
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1,
    }  # fmt: skip


def test_a_layer_on_several_devices_is_split_no_further_than_needed():
    places = {**layer(0, "cuda:0", "cuda:0"), **layer(1, "cuda:0", "cpu")}
    assert device_map(places) == {
        "model.layers.0": 0, "model.layers.1.input_layernorm": 0, "model.layers.1.self_attn": 0,
        "model.layers.1.post_attention_layernorm": 0, "model.layers.1.mlp": "cpu",
    }  # fmt: skip


def test_a_block_on_several_devices_is_split_into_its_modules():
    places = {**layer(0, "cuda:0", "cpu"), "model.layers.0.mlp.down_proj": "disk"}
    entries = device_map(places)
    assert {name: place for name, place in entries.items() if ".mlp" in name} == {
        "model.layers.0.mlp.gate_proj": "cpu", "model.layers.0.mlp.up_proj": "cpu",
        "model.layers.0.mlp.down_proj": "disk",
    }  # fmt: skip


@pytest.mark.parametrize("prefix", ["transformer.h.0", "model.decoder.layers.0", "gpt_neox.layers.0", "h.0"])
def test_layers_are_known_under_every_usual_name(prefix):
    places = {f"{prefix}.attn.q": "cuda:0", f"{prefix}.mlp.up": "cuda:0", "lm_head": "cpu"}
    assert device_map(places) == {prefix: 0, "lm_head": "cpu"}


def test_layer_1_and_layer_10_are_two_layers():
    places = {**layer(1, "cpu", "cpu"), **layer(10, "disk", "disk")}
    assert device_map(places) == {"model.layers.1": "cpu", "model.layers.10": "disk"}


@settings(deadline=None, max_examples=30)
@given(devices=st.lists(st.sampled_from(DEVICES), min_size=MODULES, max_size=MODULES))
def test_any_placement_is_kept_by_few_entries_of_which_none_is_inside_another(model, devices):
    built, owners = model
    places = dict(zip(owners, devices, strict=True))
    entries = device_map(places)
    assert {name: device_of(name, entries) for name in owners} == {
        name: accelerate_device(place) for name, place in places.items()
    }
    assert not [(a, b) for a in entries for b in entries if b.startswith(f"{a}." if a else ".")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # accelerate warns of a key that is no module
        check_device_map(built, entries)


@settings(deadline=None, max_examples=30)
@given(devices=st.lists(st.sampled_from(DEVICES), min_size=MODULES, max_size=MODULES))
def test_siblings_on_one_device_are_never_listed_one_by_one(model, devices):
    _, owners = model
    places = dict(zip(owners, devices, strict=True))
    entries = device_map(places)
    for parent in {name.rpartition(".")[0] for name in entries if ".layers." in name}:
        inside = {place for name, place in places.items() if name.startswith(f"{parent}.")}
        if parent.count(".") >= 2:  # a layer or a block of it
            assert len(inside) > 1, parent
