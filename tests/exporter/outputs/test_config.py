"""exporter/outputs/config.py: config.json of the output."""

import json

import pytest
from transformers import AutoConfig, Gemma3ForConditionalGeneration, Qwen2ForCausalLM

from exporter.outputs.config import json_bytes, output_config

QWEN2 = {
    "_name_or_path": "/home/somebody/models/qwen", "architectures": ["Qwen2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen2.Qwen2ForCausalLM"}, "model_type": "qwen2",
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128,
    "tie_word_embeddings": True, "torch_dtype": "float16", "transformers_version": "4.37.0",
    "quantization_config": {"quant_method": "gptq", "bits": 4, "torch_dtype": "float16"},
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "dtype": "float32",
    "text_config": {
        "model_type": "gemma3_text", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "torch_dtype": "float32", "quantization_config": {"quant_method": "fp8"},
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16,
        "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        "torch_dtype": "float32",
    },
}  # fmt: skip


@pytest.fixture
def loaded(tmp_path):
    """What transformers reads from a config.json of this content."""

    def load(config):
        (tmp_path / "config.json").write_bytes(json_bytes(config))
        return AutoConfig.from_pretrained(tmp_path)

    return load


def test_nothing_says_quantized_any_more_at_any_depth():
    for base in (QWEN2, GEMMA3, {"compression_config": {}, "a": {"b": {"compression_config": {"x": 1}}}}):
        text = json_bytes(output_config(base, {})).decode()
        assert "quant" not in text
        assert "compression" not in text


def test_transformers_reads_bfloat16_and_no_quantization(loaded):
    config = loaded(output_config(QWEN2, {}))
    assert str(config.dtype) == "torch.bfloat16"
    assert not hasattr(config, "quantization_config")
    assert config.architectures == ["Qwen2ForCausalLM"]


def test_the_old_name_of_dtype_becomes_the_new_one_in_its_place():
    names = list(output_config({"model_type": "qwen2", "torch_dtype": "float16", "vocab_size": 1}, {}))
    assert names == ["model_type", "dtype", "vocab_size"]


def test_parts_of_a_model_are_bfloat16_too():
    config = output_config(GEMMA3, {})
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "bfloat16"
    assert "torch_dtype" not in json_bytes(config).decode()


def test_a_dtype_that_is_no_float_is_left_alone():
    assert output_config({"index": {"dtype": "int64"}}, {})["index"] == {"dtype": "int64"}


def test_no_remote_code_is_named_unless_it_has_to_be():
    assert "auto_map" not in output_config(QWEN2, {})
    assert output_config(QWEN2, {}, keep_remote_code=True)["auto_map"] == QWEN2["auto_map"]


def test_no_path_of_the_machine_where_the_base_lay_is_left():
    assert "somebody" not in json_bytes(output_config(QWEN2, {})).decode()


def test_changes_reach_the_parameters_that_transformers_makes(loaded):
    config = loaded(output_config(QWEN2, {"vocab_size": 80, "tie_word_embeddings": False}))
    model = Qwen2ForCausalLM(config)
    assert model.lm_head.weight.shape == (80, 16)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_changes_of_a_nested_language_model_are_said_where_transformers_looks(loaded):
    config = output_config(GEMMA3, {"vocab_size": 80, "tie_word_embeddings": False})
    assert "vocab_size" not in config  # the base has it in text_config only
    model = Gemma3ForConditionalGeneration(loaded(config))
    assert model.lm_head.weight.shape == (80, 16)
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_a_language_model_two_levels_down_is_found():
    base = {"thinker_config": {"text_config": {"vocab_size": 64}, "audio_config": {"vocab_size": 9}}}
    config = output_config(base, {"vocab_size": 80})
    assert config["thinker_config"]["text_config"]["vocab_size"] == 80
    assert config["thinker_config"]["audio_config"]["vocab_size"] == 9


def test_other_changes_stand_at_the_top():
    assert output_config(GEMMA3, {"sliding_window": 7})["sliding_window"] == 7


def test_the_base_is_not_changed():
    before = json.dumps(GEMMA3)
    output_config(GEMMA3, {"vocab_size": 80, "tie_word_embeddings": False})
    assert json.dumps(GEMMA3) == before


def test_bytes_are_the_same_for_the_same_content_and_keep_its_order():
    content = {"b": 1, "a": {"名": [0.0, float("inf")]}}
    assert json_bytes(content) == json_bytes(json.loads(json.dumps(content)))
    assert json_bytes(content).endswith(b"}\n")
    assert list(json.loads(json_bytes(content))) == ["b", "a"]
    assert json.loads(json_bytes(content)) == content
