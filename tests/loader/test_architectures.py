"""loader/architectures.py against the classes and configurations of the transformers that is installed."""

import pytest
from transformers import AutoConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from loader.architectures import causal_classes, check_architecture
from loader.errors import UnsupportedModel
from loader.families import FAMILIES

CAUSAL = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# Language models that are also trained to fill gaps, and write from left to right all the same.
BOTH_WAYS = {"xlm", "reformer"}


def config_of(model_type, **others):
    return {"model_type": model_type, "architectures": [CAUSAL.get(model_type, "Some")], **others}


def refusal(config):
    with pytest.raises(UnsupportedModel) as caught:
        check_architecture("owner/name", config)
    assert str(caught.value).startswith("owner/name: model_type")
    return str(caught.value)


def test_the_list_is_read_without_importing_what_it_lists():
    assert causal_classes() == CAUSAL


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_of_the_table_is_accepted(model_type):
    check_architecture("owner/name", config_of(model_type))


OTHERS = ("gpt2", "opt", "bloom", "falcon", "mamba", "rwkv", "gpt_neox", "qwen3_next", "olmo2")


@pytest.mark.parametrize(
    "model_type",
    [*OTHERS, *sorted(BOTH_WAYS)],
)
def test_other_decoders_that_transformers_builds_are_accepted(model_type):
    check_architecture("owner/name", config_of(model_type))


@pytest.mark.parametrize(
    "model_type", sorted(set(CAUSAL) & set(MODEL_FOR_MASKED_LM_MAPPING_NAMES) - BOTH_WAYS)
)
def test_what_fills_gaps_is_refused_even_where_a_causal_class_exists(model_type):
    assert "snugfit serves decoder-only language models" in refusal(config_of(model_type))


@pytest.mark.parametrize("model_type", ["bart", "mbart", "marian", "pegasus", "whisper", "trocr", "musicgen"])
def test_half_of_an_encoder_decoder_is_refused(model_type):
    assert "encoder-decoder" in refusal(config_of(model_type))


def test_every_encoder_decoder_among_the_causal_classes_is_refused():
    both = set(CAUSAL) & set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    states_it = {name for name in both if AutoConfig.for_model(name).is_encoder_decoder}
    assert {"bart", "prophetnet"} <= states_it
    for model_type in states_it:
        assert "encoder-decoder" in refusal({"model_type": model_type})


@pytest.mark.parametrize("model_type", ["bert", "roberta", "electra"])
def test_an_encoder_that_says_it_decodes_is_accepted(model_type):
    check_architecture("owner/name", config_of(model_type, is_decoder=True))
    assert "an encoder" in refusal(config_of(model_type, is_decoder=False))


def test_a_config_that_says_it_is_an_encoder_decoder_is_believed():
    assert "encoder-decoder" in refusal(config_of("qwen2", is_encoder_decoder=True))


@pytest.mark.parametrize("model_type", ["clip", "vit", "t5"])
def test_a_model_that_transformers_knows_as_something_else_is_told_apart_from_an_unknown_one(model_type):
    assert model_type in CONFIG_MAPPING_NAMES
    known, unknown = refusal(config_of(model_type)), refusal(config_of("nonesuch"))
    assert "not as a causal language model" in known
    assert "pip install -U transformers" in unknown


def test_code_that_comes_with_a_model_is_never_run():
    auto_map = {"AutoModelForCausalLM": "modeling_nonesuch.NonesuchForCausalLM"}
    assert "trust_remote_code is off" in refusal(config_of("nonesuch", auto_map=auto_map))
    check_architecture("owner/name", config_of("qwen2", auto_map=auto_map))  # transformers' own class is used


@pytest.mark.parametrize("model_type", [None, "", 7, ["qwen2"], {}])
def test_a_config_that_does_not_name_its_kind_is_refused(model_type):
    assert "does not name the kind of model" in refusal({"model_type": model_type})
    assert "does not name the kind of model" in refusal({})


@pytest.mark.parametrize(
    "architectures",
    [
        None,
        [],
        "Qwen2ForCausalLM",
        ["Qwen2ForCausalLM"],
        ["LlavaForConditionalGeneration"],
        ["GPT2LMHeadModel"],
    ],
)
def test_an_architecture_that_writes_text_or_none_at_all_is_accepted(architectures):
    check_architecture("owner/name", {"model_type": "qwen2", "architectures": architectures})


@pytest.mark.parametrize(
    "name", ["Qwen2Model", "Qwen2ForSequenceClassification", "Qwen2ForTokenClassification"]
)
def test_an_architecture_without_a_head_for_text_is_refused_by_its_name(name):
    assert name in refusal({"model_type": "qwen2", "architectures": [name]})


def test_a_causal_class_of_an_unusual_name_is_accepted():
    assert CAUSAL["bert-generation"] == "BertGenerationDecoder"
    check_architecture("owner/name", config_of("bert-generation", is_decoder=True))
