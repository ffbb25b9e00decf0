"""exporter/adapters/ties.py: one matrix for input and output, until an adapter changes one side."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from exporter import merge
from exporter.adapters import adapter as adapters
from exporter.adapters import ties
from exporter.errors import BadAdapter
from exporter.weights import Inputs

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OF_HEAD = f"base_model.model.{HEAD}"
Q = {"target_modules": ["q_proj"]}
# name -> (LoraConfig, whether one matrix is left)
CASES = {
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, False),
    "each with its own": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "tied adapters": ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tied adapters of dora": (
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "use_dora": True}, False,
    ),
    "dora of the embedding": ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "dora of the head": ({"target_modules": ["lm_head"], "use_dora": True}, False),
    "trained embedding": (Q | {"modules_to_save": ["embed_tokens"]}, False),
    "trained head": (Q | {"modules_to_save": ["lm_head"]}, False),
    "both trained": (Q | {"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "trained as one": (Q | {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "tokens": (Q | {"trainable_token_indices": [2, 50]}, True),
    "the same tokens for both": (
        Q | {"trainable_token_indices": {"embed_tokens": [2, 50], "lm_head": [2, 50]}}, True,
    ),
    "other tokens for the head": (
        Q | {"trainable_token_indices": {"embed_tokens": [2, 50], "lm_head": [3]}}, False,
    ),
    "tokens and a head": ({"target_modules": ["lm_head"], "trainable_token_indices": [2, 50]}, False),
    "no side": (Q, True),
}  # fmt: skip
RESIZED = {
    "resized": (Q, True),
    "resized, with tokens": (Q | {"trainable_token_indices": [96, 99]}, True),
    "resized, with an adapter of the embedding": ({"target_modules": ["embed_tokens"]}, False),
}


def logits(model, vocab=96):
    with torch.no_grad():
        return model(torch.arange(vocab).view(2, -1)).logits


def rebuilt(base, tensors, changes):
    """The exported model as transformers loads it."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base, **changes), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {HEAD}
    model.tie_weights()
    return model.eval()


@pytest.mark.parametrize("case", [*CASES, *RESIZED])
def test_merged_logits_are_those_of_base_and_adapter(fp32_tied, make_adapter, exported, planned, load, case):
    """peft's own merge changes both sides, and other answers come out (huggingface/peft issue 2777)."""
    lora, stays_tied = (CASES | RESIZED)[case]
    rows = 100 if case in RESIZED else None
    adapter = make_adapter(fp32_tied, resize=rows, **lora)
    unmerged = PeftModel.from_pretrained(load(fp32_tied, rows), adapter).eval()
    tied = planned(fp32_tied, adapter)
    assert tied.changes.get("tie_word_embeddings", True) is stays_tied
    assert tied.changes.get("vocab_size") == rows
    assert all(same(*pair) for pair in tied.must_be_equal)
    tensors = exported(fp32_tied, adapter, block=10, dtype=torch.float32)
    assert (HEAD in tensors) is not stays_tied
    theirs = logits(unmerged, rows or 96)
    ours = logits(rebuilt(fp32_tied, tensors, dict(tied.changes)), rows or 96)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max())


def test_without_the_key_a_model_is_tied_when_its_file_has_no_head(
    fp32_gpt2, tmp_path, make_adapter, exported, planned, load
):
    """Older config.json of GPT-2 leave it to the class."""
    base = copied(fp32_gpt2, tmp_path)
    config = json.loads((base / "config.json").read_text())
    del config["tie_word_embeddings"]
    (base / "config.json").write_text(json.dumps(config))
    adapter = make_adapter(base, target_modules=["wte", "c_attn"])
    unmerged = PeftModel.from_pretrained(load(base), adapter).eval()
    assert planned(base, adapter).changes == {"tie_word_embeddings": False}
    model = rebuilt(base, exported(base, adapter, dtype=torch.float32), {"tie_word_embeddings": False})
    torch.testing.assert_close(logits(model), logits(unmerged), rtol=1e-4, atol=1e-3)


def test_a_note_says_who_changed_one_side(fp32_tied, make_adapter, planned):
    adapter = make_adapter(fp32_tied, target_modules=["lm_head"])
    (note,) = planned(fp32_tied, adapter).notes
    assert f"and {adapter.name} changes them apart" in note
    assert str(adapter) not in note
    assert "tie_word_embeddings is false" in note


def test_untied_embeddings_stay_as_they_are(tiny_qwen2, make_adapter, planned):
    adapter = make_adapter(tiny_qwen2, target_modules=["embed_tokens"])
    tied = planned(tiny_qwen2, adapter)
    assert not tied.changes
    assert {EMBEDDING, HEAD} <= {recipe.name for recipe in tied.recipes}


def test_a_resized_vocabulary_is_compared_where_both_sides_were_saved(fp32_tied, make_adapter, planned):
    adapter = make_adapter(fp32_tied, resize=100, **Q)
    (pair,) = planned(fp32_tied, adapter).must_be_equal
    assert [weight.shape for weight in pair] == [(100, 64)] * 2
    assert same(*pair)
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: tensors | {OF_HEAD: tensors[OF_HEAD] + 1})
    (pair,) = planned(fp32_tied, adapter).must_be_equal
    assert not same(*pair)


def test_tied_adapters_are_compared(fp32_tied, make_adapter, planned):
    adapter = make_adapter(fp32_tied, target_modules=["embed_tokens"], ensure_weight_tying=True)
    pairs = planned(fp32_tied, adapter).must_be_equal
    shapes = sorted(weight.shape for pair in pairs for weight in pair)
    assert shapes == [(4, 64), (4, 64), (96, 4), (96, 4), (96, 64), (96, 64)]
    assert all(same(*pair) for pair in pairs)


TOKENS = "token_adapter.trainable_tokens_delta"
TOKENS_OF_HEAD = f"base_model.model.lm_head.{TOKENS}"
TOKENS_OF_EMBEDDING = f"base_model.model.model.embed_tokens.{TOKENS}"
BOTH = {"embed_tokens": [1, 2], "lm_head": [1, 2]}


@pytest.fixture
def tokens_of_both(fp32_tied, make_adapter):
    """An adapter with rows of tokens for each side; the head's are others than the embedding's."""
    adapter = make_adapter(fp32_tied, **Q, trainable_token_indices=BOTH)

    def add(tensors):
        return tensors | {TOKENS_OF_HEAD: tensors[TOKENS_OF_EMBEDDING] + 1}

    rewrite(adapter / "adapter_model.safetensors", add)
    return adapter


def test_the_same_tokens_for_both_sides_are_compared(fp32_tied, tokens_of_both, planned):
    tied = planned(fp32_tied, tokens_of_both)
    (pair,) = tied.must_be_equal
    assert [weight.name for weight in pair] == [TOKENS_OF_EMBEDDING, TOKENS_OF_HEAD]
    assert HEAD not in {recipe.name for recipe in tied.recipes}
    assert not same(*pair)
    rewrite(
        tokens_of_both / "adapter_model.safetensors",
        lambda tensors: tensors | {TOKENS_OF_HEAD: tensors[TOKENS_OF_EMBEDDING].clone()},
    )
    (pair,) = planned(fp32_tied, tokens_of_both).must_be_equal
    assert same(*pair)


@pytest.mark.parametrize("of_head", [[2, 1], [3, 4]])
@pytest.mark.parametrize("tying", [False, True])
def test_other_tokens_for_the_head_untie_whatever_was_asked_for(
    fp32_tied, tokens_of_both, exported, planned, edit_config, of_head, tying
):
    indices = {"embed_tokens": [1, 2], "lm_head": of_head}
    edit_config(tokens_of_both, trainable_token_indices=indices, ensure_weight_tying=tying)
    tied = planned(fp32_tied, tokens_of_both)
    assert tied.changes == {"tie_word_embeddings": False}
    assert not tied.must_be_equal
    learned = load_file(tokens_of_both / "adapter_model.safetensors")
    tensors = exported(fp32_tied, tokens_of_both, dtype=torch.float32)
    assert torch.equal(tensors[EMBEDDING][[1, 2]], learned[TOKENS_OF_EMBEDDING])
    assert torch.equal(tensors[HEAD][of_head], learned[TOKENS_OF_HEAD])


def test_tokens_of_untied_sides_are_not_compared(tiny_qwen2, make_adapter, planned):
    adapter = make_adapter(tiny_qwen2, **Q, trainable_token_indices=BOTH)
    tied = planned(tiny_qwen2, adapter)
    assert not tied.must_be_equal
    assert {recipe.name for recipe in tied.recipes if recipe.updates} >= {EMBEDDING, HEAD}


def test_a_copy_of_another_shape_is_another(fp32_tied, make_adapter, planned):
    adapter = make_adapter(fp32_tied, resize=100, **Q)
    rewrite(
        adapter / "adapter_model.safetensors",
        lambda tensors: tensors | {OF_HEAD: tensors[OF_HEAD][:98].clone()},
    )
    (pair,) = planned(fp32_tied, adapter).must_be_equal
    assert sorted(weight.shape for weight in pair) == [(98, 64), (100, 64)]
    with Inputs() as inputs:
        assert not merge.same(*pair, inputs)


def test_adapters_of_positions_are_not_taken_for_the_embeddings(fp32_gpt2, make_adapter, planned):
    adapter = make_adapter(fp32_gpt2, target_modules=["wte", "wpe"], ensure_weight_tying=True)

    def add(tensors):
        wte, head = "base_model.model.transformer.wte.lora_embedding", "base_model.model.lm_head.lora"
        a, b = (tensors[f"{wte}_{part}"].T.contiguous() for part in "BA")
        return tensors | {f"{head}_A.weight": a, f"{head}_B.weight": b}

    rewrite(adapter / "adapter_model.safetensors", add)
    pairs = planned(fp32_gpt2, adapter).must_be_equal
    assert len(pairs) == 2
    assert all(same(*pair) for pair in pairs)


def test_a_tensor_of_an_adapter_without_a_part_in_the_output_is_refused(fp32_tied, make_adapter, planned):
    adapter = make_adapter(fp32_tied, **Q)
    config = json.loads((fp32_tied / "config.json").read_text())
    recipes = planned(fp32_tied).recipes
    with pytest.raises(BadAdapter, match=r"4 of its 4 tensors .*q_proj.lora_A.* no effect on the output"):
        ties.resolve(recipes, config, [adapters.read(str(adapter))])


def test_a_head_that_is_a_copy_is_left_out_and_compared(fp32_tied, tmp_path, planned):
    base = copied(fp32_tied, tmp_path)
    rewrite(base / "model.safetensors", lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()})
    tied = planned(base)
    assert HEAD not in {recipe.name for recipe in tied.recipes}
    assert not tied.changes
    assert {weight.name for pair in tied.must_be_equal for weight in pair} == {EMBEDDING, HEAD}


def test_a_resized_vocabulary_of_untied_embeddings_takes_both_from_the_adapter(
    tiny_qwen2, make_adapter, exported, planned, merged_by_peft
):
    adapter = make_adapter(tiny_qwen2, resize=70, target_modules=["embed_tokens", "lm_head"])
    assert planned(tiny_qwen2, adapter).changes == {"vocab_size": 70}
    theirs = merged_by_peft(tiny_qwen2, adapter, resize=70)
    ours = exported(tiny_qwen2, adapter, block=9)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_rows_of_input_and_output_that_differ_are_refused(tiny_qwen2, make_adapter, planned):
    adapter = make_adapter(tiny_qwen2, resize=100, **Q)
    rewrite(adapter / "adapter_model.safetensors", lambda tensors: without(tensors, "lm_head"))
    with pytest.raises(BadAdapter, match=r"embed_tokens.weight has 100 rows and lm_head.weight has 96"):
        planned(tiny_qwen2, adapter)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(tiny_qwen2, make_adapter, planned):
    adapter = make_adapter(tiny_qwen2, **Q)
    (adapter / "vocab.json").write_text(json.dumps({f"t{number}": number for number in range(96)}))
    (adapter / "merges.txt").write_text("#version: 0.2\n")
    planned(tiny_qwen2, adapter)
    (adapter / "added_tokens.json").write_text(json.dumps({"<a>": 96, "<b>": 97}))
    with pytest.raises(BadAdapter, match=r"98 tokens .* 96 rows: 2 tokens have no embedding"):
        planned(tiny_qwen2, adapter)


def test_two_adapters_that_saved_the_same_base_are_compared_and_summed(tiny_qwen2, make_adapter, planned):
    pair = [make_adapter(tiny_qwen2, target_modules=["embed_tokens"]) for _ in range(2)]
    tied = planned(tiny_qwen2, *pair)
    assert len(tied.must_be_equal) == 1
    (recipe,) = (recipe for recipe in tied.recipes if recipe.name == EMBEDDING)
    assert [update.adapter for update in recipe.updates] == [str(folder) for folder in pair]


def same(one, other):
    assert one.shape == other.shape
    with Inputs() as inputs:
        whole = [weight.open(inputs)(0, weight.shape[0]).clone() for weight in (one, other)]
    return torch.equal(*whole)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def rewrite(file, change):
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without(tensors, word):
    return {name: tensor for name, tensor in tensors.items() if word not in name}
