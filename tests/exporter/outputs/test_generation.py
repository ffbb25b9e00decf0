"""generation.py: generation_config.json of the output, against transformers' own validation."""

import itertools
import json
from functools import cache

import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS, GenerationMode

from exporter.outputs.config import json_bytes
from exporter.outputs.generation import output_generation_config

GREEDY, SAMPLE = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE
NAN, INF = float("nan"), float("inf")

VICUNA = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}  # transformers 29988
QWEN3_ASR = {"do_sample": False, "temperature": 1e-6}
QWEN1 = {
    "chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643, "max_window_size": 6144,
    "max_new_tokens": 512, "do_sample": True, "top_k": 0, "top_p": 0.8, "repetition_penalty": 1.1,
}  # fmt: skip
BROKEN = [
    VICUNA,
    QWEN3_ASR,
    {"do_sample": False, "temperature": 0.9, "top_p": 0.6},
    {"do_sample": None, "top_k": 20},
    {"do_sample": "yes", "temperature": "hot", "top_p": [0.5], "top_k": {}},
    {"do_sample": True, "temperature": 0},
    {"do_sample": True, "temperature": -1.0, "top_p": 1.5, "top_k": -1, "min_p": 2, "typical_p": 0},
    {"do_sample": True, "temperature": NAN, "repetition_penalty": INF, "invented": NAN},
    {"do_sample": True, "temperature": 10**400},
    {"temperature": 0.0},
    {"top_k": 0},
    {"min_p": 0.1, "top_h": 0.4, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"num_beams": 4, "temperature": 0.5},
    {"early_stopping": True, "length_penalty": 2.0},
    {"early_stopping": ["never"]},
    {"num_beams": 1, "early_stopping": "never"},
    {"num_beams": 0, "num_return_sequences": 3},
    {"num_beams": 2, "num_return_sequences": 3},
    {"num_return_sequences": 3},
    {"max_new_tokens": 0, "max_length": -5, "min_length": "x"},
    {"pad_token_id": -1, "eos_token_id": "</s>", "bos_token_id": [1, None]},
    {"cache_implementation": "invented"},
    {"cache_implementation": ["static"]},
    {"use_cache": False, "cache_implementation": "static", "cache_config": {"nbits": 4}},
    {"output_scores": True, "output_attentions": True, "output_logits": True, "output_hidden_states": True},
    {"suppress_tokens": [2, 3], "forced_eos_token_id": 2, "forced_bos_token_id": [3, 2]},
    {"suppress_tokens": 5, "forced_eos_token_id": "two"},
    {"compile_config": {"mode": "reduce-overhead"}, "streamer": 1, "assistant_model": "x"},
    {"watermarking_config": {"ngram_len": 5, "keys": [1]}},
    {"watermarking_config": {"seeding_scheme": "none"}},
    {"watermarking_config": {"greenlist_ratio": 2}},
    {"watermarking_config": "yes"},
    {"assistant_ensemble_weight": 1.0},
    {"_original_object_hash": 1, "_commit_hash": "abc", "_from_model_config": True, "top_p": 0.5},
]
SOUND = [
    {},
    QWEN1,
    {"do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0},
    {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [128001, 128008, 128009]},
    {"do_sample": True, "temperature": 1e-6},
    {"do_sample": True, "num_return_sequences": 2, "min_p": 0.05},
    {"num_beams": 4, "early_stopping": "never", "length_penalty": 0.6, "num_return_sequences": 2},
    {"num_beams": 2, "do_sample": True, "temperature": 0.5},
    {"watermarking_config": {"bias": 2.5, "seeding_scheme": "selfhash"}},
    {"return_dict_in_generate": True, "output_scores": True},
    {"suppress_tokens": [2], "forced_eos_token_id": [2, 3]},
    {"trained_by": "a key of somebody's own", "temperature": None},
]


def mended(base, config=None, trained_eos=None):
    return output_generation_config(base, config or {}, trained_eos)


def saved(config, folder):
    """Written to a file and saved again by transformers, which validates strictly."""
    (folder / "generation_config.json").write_bytes(json_bytes(config))
    found = GenerationConfig(**json.loads((folder / "generation_config.json").read_bytes()))
    found.save_pretrained(folder)
    return found


@pytest.mark.parametrize("base", BROKEN, ids=str)
def test_what_transformers_refuses_is_mended_and_noted(base, tmp_path):
    with pytest.raises((ValueError, TypeError, AttributeError, OverflowError)):
        use(base, tmp_path)
    config, notes = mended(base)
    use(config, tmp_path)
    assert notes
    assert all(note.startswith("generation_config.json: ") and note.endswith(".") for note in notes)


def use(config, folder):
    """Save and generate with it. JSON of other languages has no NaN, which transformers would not notice."""
    json.dumps(config, allow_nan=False)
    generate(saved(config, folder))


@pytest.mark.parametrize("base", SOUND, ids=str)
def test_a_sound_file_stays_as_it_is(base, tmp_path):
    assert mended(base) == (base, ())
    saved(base, tmp_path)


@pytest.mark.parametrize("base", BROKEN + SOUND, ids=str)
def test_what_is_mended_needs_no_mending(base):
    config, _ = mended(base)
    assert mended(config) == (config, ())


def test_any_two_broken_files_in_one_are_mended_too(tmp_path):
    for one, other in itertools.combinations(BROKEN, 2):
        GenerationConfig(**mended(one | other)[0]).validate(strict=True)


@cache
def tiny_model():
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["full_attention"],
    )  # fmt: skip
    return Qwen2ForCausalLM(shape).eval()


def generate(config):
    """Answer with a tiny model, where this generation config asks for what it can do."""
    config = GenerationConfig(**(config.to_dict() | {"max_new_tokens": 2, "max_length": None}))
    if config.penalty_alpha or config.get_generation_mode() not in (GREEDY, SAMPLE):
        return
    if config.watermarking_config is not None:
        return
    config.cache_implementation = None  # a static cache is compiled
    tiny_model().generate(
        torch.tensor([[1, 2, 3]]), generation_config=config, pad_token_id=0, eos_token_id=31
    )


@pytest.mark.parametrize(
    ("base", "mode"),
    [
        (VICUNA, SAMPLE),
        ({"do_sample": None, "top_k": 20}, SAMPLE),
        ({"do_sample": 1, "top_k": 20}, SAMPLE),
        (QWEN3_ASR, GREEDY),
        ({"do_sample": False, "temperature": 0.9, "top_p": 0.6}, GREEDY),
        ({"temperature": 0.0}, GREEDY),
        ({"temperature": 1e-6, "top_p": 0.5}, GREEDY),
        ({"do_sample": True, "temperature": 0, "top_p": 0.5}, GREEDY),
        ({"top_k": 0}, GREEDY),
        ({"num_beams": 4, "temperature": 0.5}, GenerationMode.BEAM_SEARCH),
    ],
    ids=str,
)
def test_it_samples_where_the_file_means_it(base, mode):
    assert GenerationConfig(**mended(base)[0]).get_generation_mode() == mode


def test_parameters_of_sampling_are_kept_where_it_samples():
    config, notes = mended(VICUNA)
    assert config == {**VICUNA, "do_sample": True}
    assert notes == (
        "generation_config.json: do_sample is true now: only sampling reads temperature 0.9 and top_p 0.6.",
    )


def test_what_is_taken_from_a_greedy_file_is_noted_with_its_value():
    _, (note,) = mended({"do_sample": False, "temperature": 0.9, "top_p": 0.6})
    assert "without temperature 0.9 and top_p 0.6" in note
    assert "vLLM does not read do_sample" in note


def test_parameters_that_change_nothing_decide_nothing():
    config, notes = mended({"top_k": 0, "typical_p": 1.0})
    assert config == {"typical_p": 1.0}
    assert len(notes) == 1


def test_whole_numbers_become_what_transformers_asks_for():
    config, notes = mended({"do_sample": True, "temperature": 2, "top_k": 50.0, "repetition_penalty": 2})
    assert notes == ()
    assert {key: type(value) for key, value in config.items()} == {
        "do_sample": bool, "temperature": float, "top_k": int, "repetition_penalty": float,
    }  # fmt: skip
    generate(GenerationConfig(**config))


def test_every_cache_that_transformers_knows_is_kept():
    for name in (*ALL_CACHE_IMPLEMENTATIONS, "paged"):
        assert mended({"cache_implementation": name}) == ({"cache_implementation": name}, ())


def test_without_a_file_config_json_is_asked():
    old = {"model_type": "llama", "eos_token_id": 2, "bos_token_id": 1, "temperature": 0.5, "top_p": None}
    config, _ = mended(None, old)
    assert config == {"temperature": 0.5, "bos_token_id": 1, "eos_token_id": 2, "do_sample": True}
    assert mended(None, {"model_type": "llama"}) == ({}, ())


def test_without_a_file_a_nested_config_is_asked_too():
    assert mended(None, {"eos_token_id": None, "text_config": {"eos_token_id": [1, 106]}}) == (
        {"eos_token_id": [1, 106]},
        (),
    )


def test_an_end_that_only_config_json_knows_is_added():
    config, (note,) = mended({"do_sample": False}, {"eos_token_id": 0})
    assert config["eos_token_id"] == 0
    assert "no answer ends" in note


def test_the_end_that_an_adapter_was_trained_with_is_added_once():
    config, (note,) = mended({"eos_token_id": 151643}, {}, trained_eos=151645)
    assert config["eos_token_id"] == [151643, 151645]
    assert "adapter" in note
    assert mended(config, {}, trained_eos=151645) == (config, ())
    assert mended({}, {}, trained_eos=7)[0] == {"eos_token_id": 7}


def test_the_base_is_not_changed():
    base = {"do_sample": False, "temperature": 0.9}
    mended(base)
    assert base == {"do_sample": False, "temperature": 0.9}
