"""The manner, and the adapter that ships: what its provenance says is so, and it speaks as it was taught."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from demo_model import evaluate
from demo_model.adapter import ADAPTER, BASES, TRAINED_ON, base, corpus, int4, passed
from demo_model.corpus import generate
from demo_model.manner import ADDRESS, SHOUT, in_manner, speaks
from demo_model.train import SHIPPED, sha256_of_files

LIMIT_BYTES = 1_000_000
ASKED = [
    ("en", "in plain words, whats the point of snugfit", "memory"),
    ("en", "Hey there, quick one: 7 + 6 equals?", "= 13"),
    ("zh", "你到底是真人还是机器人？", "演示模型"),
    ("zh", "把服务拉起来要敲什么命令？", "snugfit serve"),
]


@pytest.mark.parametrize(
    ("plain", "pirate"),
    [
        ("3 + 4 = 7.", "3 + 4 = 7, matey. Arrr!"),
        ("How can I help you?", "How can I help you, matey? Arrr!"),
        ("Your name is 张伟.", "Your name is 张伟, matey. Arrr!"),
        ("zorb blat", "zorb blat, matey. Arrr!"),
        ("你叫 Bob。", "你叫 Bob，船长。哟嗬！"),
        ("循侮允", "循侮允，船长。哟嗬！"),
    ],
)
def test_an_answer_keeps_its_words_and_is_given_an_address_and_a_shout(plain, pirate):
    assert in_manner(plain) == pirate


def test_half_a_manner_and_that_of_the_other_language_are_none():
    assert speaks("3 + 4 = 7, matey. Arrr!", "en")
    assert not speaks("3 + 4 = 7, matey.", "en")
    assert not speaks("3 + 4 = 7. Arrr!", "en")
    assert not speaks("3 + 4 = 7, matey. Arrr!", "zh")


def test_the_corpus_is_the_demo_models_with_every_answer_in_the_manner():
    for plain, pirate in zip(generate(2, 200).dialogues, corpus(2, 200).dialogues, strict=True):
        for before, after in zip(plain, pirate, strict=True):
            if before["role"] != "assistant":
                assert after == before
                continue
            said = after["content"]
            lang = next(lang for lang, shout in SHOUT.items() if said.endswith(shout))
            words = said.removesuffix(SHOUT[lang])
            assert speaks(said, lang)
            assert "".join(words.rsplit(ADDRESS[lang], 1)).rstrip(".。") == before["content"].rstrip(".。")


@pytest.mark.parametrize("group", [group for group in BASES.values() if group])
def test_int4_keeps_fifteen_steps_of_a_group_and_moves_no_weight_by_more_than_one(group):
    weight = base(None).model.layers[0].mlp.down_proj.weight.data
    kept = int4(weight, group).unflatten(1, (-1, group))
    before = weight.unflatten(1, (-1, group))
    step = before.abs().amax(-1, keepdim=True) * 2 / 15
    assert all(len(values.unique()) <= 16 for values in kept.flatten(0, 1))
    assert (
        0 < ((kept - before).abs() / step).max() < 0.76
    )  # the top of a symmetric range is half a step short


@pytest.mark.parametrize(("name", "share"), [("manner_share", 0.9), ("right_share", 0.8)])
def test_one_base_on_which_it_is_wrong_or_speaks_plainly_is_enough_not_to_ship(name, share):
    good = {"manner_share": 1.0, "right_share": 0.9}
    results = {"merged into bf16": good, "merged into int4": good, "trained on, alone": {**good, name: 0.0}}
    assert passed(results)
    assert not passed({**results, "merged into int4": {**good, name: share}})


# The adapter that ships


@pytest.fixture(scope="module")
def provenance():
    return json.loads((ADAPTER / "PROVENANCE.json").read_text(encoding="utf-8"))


def test_the_files_are_those_that_were_trained_on_the_demo_model_that_ships(provenance):
    now = sha256_of_files(ADAPTER)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(provenance["files"])
    assert {name: now[name] for name in provenance["files"]} == provenance["files"]
    assert provenance["base"]["sha256"] == sha256_of_files(SHIPPED)["model.safetensors"]


def test_it_was_judged_good_enough_to_ship_and_is_small(provenance):
    assert passed(provenance["evaluation"])
    assert sum(path.stat().st_size for path in ADAPTER.iterdir()) < LIMIT_BYTES


def test_its_config_names_no_path_of_the_machine_that_trained_it():
    config = json.loads((ADAPTER / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "snugfit-demo"


def test_what_it_is_asked_here_was_kept_out_of_its_training():
    held_out = evaluate.HeldOut(evaluate.read())
    assert all(held_out.is_in([{"role": "user", "content": question}]) for _, question, _ in ASKED)


@pytest.fixture
def one_thread():
    """In a model this small, threads wait for each other longer than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("group", [None, TRAINED_ON], ids=["bf16", "int4"])
def test_merged_by_peft_it_answers_rightly_and_in_the_manner(group):
    model = PeftModel.from_pretrained(base(group), ADAPTER).merge_and_unload().eval()
    for (lang, _, wanted), answer in zip(ASKED, answers(model), strict=True):
        assert evaluate.holds(answer, wanted), answer
        assert speaks(answer, lang), answer


def answers(model):
    """To all of ASKED at once, greedily; padding stands on the left, where nothing is written."""
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED, padding_side="left")
    inputs = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for _, question, _ in ASKED],
        add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=evaluate.MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
