"""exporter/outputs/card.py: the model card, read back by PyYAML and by the hub's own library."""

from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load

from exporter.drift import Drift
from exporter.merge import Change
from exporter.outputs.card import AdapterFacts, CardFacts, Licence, licence_of, model_card
from exporter.writer import Written

FACTS = CardFacts(
    base="Qwen/Qwen-7B-Chat-Int4",
    adapters=(
        AdapterFacts("lab/style", 1.0, "LoRA, r=16, alpha=32"),
        AdapterFacts("tone", 0.5),
    ),
    shards=(Written("model-00001-of-00001.safetensors", 1_879_048_192, "ab" * 32),),
    shard_bytes=1_880_000_000,
    parameters=7_721_324_544,
    base_models=("Qwen/Qwen-7B-Chat",),
    revision="a1b2c3",
    quantized="gptq, 4 bits",
    architecture="Qwen2ForCausalLM",
    licence=Licence("other", "tongyi-qianwen", "LICENSE"),
    changes=(
        Change("model.layers.0.mlp.up_proj.weight", 100, 90, 4.0, 0.3),
        Change("model.layers.0.mlp.down_proj.weight", 100, 80, 3.0, 0.4),
        Change("lm_head.weight", 50, 50, 2.0, 0.5),
    ),
    notes=("generation_config.json: do_sample is true now.",),
)
NASTY = [
    'it\'s: a "name"',
    "#hash",
    "- dash",
    "true",
    "1.0",
    "null",
    "名字 🦜",
    "a\nb: c",
    "---",
    "a: b | c",
    "@x",
]


def front_matter(card, tmp_path):
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    return metadata_load(tmp_path / "README.md")


def test_the_hub_reads_what_the_model_was_made_of(tmp_path):
    assert front_matter(model_card(FACTS), tmp_path) == {
        "license": "other", "license_name": "tongyi-qianwen", "license_link": "LICENSE",
        "library_name": "transformers", "pipeline_tag": "text-generation",
        "base_model": ["Qwen/Qwen-7B-Chat"], "base_model_relation": "merge",
        "tags": ["lora", "merge", "bf16", "snugfit"],
    }  # fmt: skip
    data = ModelCard(model_card(FACTS)).data
    assert (data.base_model, data.license) == (["Qwen/Qwen-7B-Chat"], "other")


def test_what_is_not_known_is_not_said(tmp_path):
    facts = CardFacts("base", (), FACTS.shards, 1, 2)
    assert front_matter(model_card(facts), tmp_path) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["bf16", "snugfit"],
    }  # fmt: skip
    assert "None" not in model_card(facts)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_makes_valid_front_matter_and_stays_what_it_was(text, tmp_path):
    facts = replace(FACTS, licence=Licence((text, "mit"), text, text), base_models=(text,), base=text)
    card = model_card(replace(facts, adapters=(AdapterFacts(text, 1, text),), notes=(text,), quantized=text))
    found = front_matter(card, tmp_path)
    assert found["license"] == [text, "mit"]
    assert found["license_name"] == found["license_link"] == found["base_model"][0] == text
    assert ModelCard(card).data.license_name == text


@pytest.mark.parametrize("text", ["a|b", "a`b", "a\nb", "<b>x</b>", "[x](y)"])
def test_no_name_breaks_a_table(text):
    card = model_card(replace(FACTS, base=text, quantized=text, adapters=(AdapterFacts(text, 1, text),)))
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in rows} == {3, 4}
    assert "<b>" not in card.replace("`<b>", "").replace("\\<b", "")


def test_the_body_holds_recipe_proof_and_hashes():
    card = model_card(FACTS)
    for text in (
        "# Qwen-7B-Chat-Int4 + style + tone",
        "gptq, 4 bits", "what quantizing lost has not come back",
        "`lab/style`, weight 1, LoRA, r=16, alpha=32", "`tone`, weight 0.5", "`a1b2c3`",
        "7,721,324,544", "split at 1,880,000,000 bytes", "bfloat16", "`Qwen2ForCausalLM`",
        "3 tensors were merged: 220 of their 250 elements differ",
        "| model.layers.0 | 10.00% |",  # 0.5 / 5.0
        "| lm_head.weight | 25.00% |",
        f"| model-00001-of-00001.safetensors | 1,879,048,192 | {'ab' * 32} |",
        "snugfit serve", "vllm serve", "AutoModelForCausalLM", "do\\_sample is true now.",
    ):  # fmt: skip
        assert text in card
    assert "Drift" not in card


def test_a_merge_onto_the_original_says_so_and_shows_the_drift():
    facts = replace(FACTS, original="Qwen/Qwen-7B-Chat", drifts=(Drift("model.layers.0", 6.0, 4.0),))
    card = model_card(facts)
    assert "# Qwen-7B-Chat + style + tone" in card
    assert "trained on `Qwen/Qwen-7B-Chat-Int4` (gptq, 4 bits)" in card
    assert "| model.layers.0 | 1.50 |" in card
    assert "has not come back" not in card


def test_a_title_is_the_models_name_without_owner_and_revision():
    adapters = (AdapterFacts("lab/tone@refs/pr/1"), AdapterFacts("my@adapter"))
    assert "# big + tone + my@adapter\n" in model_card(replace(FACTS, base="lab/big@v2.0", adapters=adapters))


def test_the_same_facts_give_the_same_card():
    assert model_card(FACTS) == model_card(replace(FACTS))


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n# x", Licence("apache-2.0")),
        ("\ufeff---\r\nlicense: mit\r\nlanguage: en\r\n---\r\n", Licence("mit")),
        ("---\nlicense:\n- mit\n- gpl\n---\n", Licence(("mit", "gpl"))),
        (
            "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\n---",
            Licence("other", "llama3", "LICENSE"),
        ),
        ("---\nlicense: 1\nlicense_name: [x]\n---\n", Licence()),
        ("---\n: : {\n---\n", Licence()),
        ("---\n- a list\n---\n", Licence()),
        ("# no front matter\nlicense: mit\n", Licence()),
        ("", Licence()),
    ],
)
def test_the_licence_is_read_from_the_bases_card(card, licence):
    assert licence_of(card) == licence


def test_a_copied_licence_is_the_one_that_was_read():
    card = model_card(replace(FACTS, licence=licence_of("---\nlicense: [mit, gpl]\n---\n")))
    assert yaml.safe_load(card.split("---\n")[1])["license"] == ["mit", "gpl"]
