"""compare.py: the check tells right merges from wrong ones; its numbers are those of whole models."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from exporter.adapters.experts import ExpertsLowRank
from exporter.adapters.lora import Factors, LowRank, ReplaceRows
from exporter.errors import Stopped, VerificationFailed
from exporter.logits import compare as logits
from exporter.logits.compare import PROMPTS, check_comparable, compare, tokenized
from exporter.logits.variants import NotComparable
from exporter.merge import merge
from exporter.recipe import Recipe
from exporter.shards import output_dtype
from exporter.weights import Inputs, Plain, Stored
from loader import checkpoint
from loader.files import read_header
from loader.shards import torch_dtype

DEMO = Path(__file__).parents[3] / "service" / "demo"
FILE, ADAPTER = "model.safetensors", "adapter_model.safetensors"
SMALL = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
# One of each way in which a model uses its matrices.
FAMILIES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},  # biases, and a head that is the embedding
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # Conv1D, learned positions
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0},  # scaled embedding, capped logits
    "falcon": {},  # x @ W.T
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 32},  # the head calls the body's decoder
    "lfm2": {"conv_L_cache": 3, "layer_types": ["conv", "full_attention"]},
    # A tensor for each expert.
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},  # experts in one tensor, transposed, with biases
}
UP = "model.layers.1.mlp.up_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch):
    """Tiny matrices would be one block."""
    monkeypatch.setattr("exporter.logits.variants.BLOCK_ELEMENTS", 200)
    monkeypatch.setattr("exporter.logits.forward.HEAD_ROWS", 7)


@dataclass(frozen=True)
class Case:
    """A base, an adapter of rank 2 on each of its matrices, and the recipes of the export."""

    folder: Path
    recipes: list[Recipe]

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def merged(self, change: Callable[[Recipe], Recipe] = lambda recipe: recipe) -> Path:
        """The export's output, where the merge took other recipes than it should have."""
        return write(self.folder / "out", self.base, {r.name: merge_one(change(r)) for r in self.recipes})

    def whole(self, folder: Path | None = None, is_adapted: bool = False) -> torch.nn.Module:
        """The model in transformers: the folder's, or the base, with the adapter's updates in fp32."""
        if is_adapted:
            folder = write(self.folder / "adapted", self.base, {r.name: summed(r) for r in self.recipes})
        return AutoModelForCausalLM.from_pretrained(
            folder or self.base, dtype=torch.float32, attn_implementation="eager",
            experts_implementation="eager",
        )  # fmt: skip


@pytest.fixture
def case(tmp_path):
    """`case("llama", dtype, strength)`: a base with random weights, and recipes that add an adapter to it."""

    def make(family="llama", dtype=torch.bfloat16, strength=1.0):
        torch.manual_seed(3)
        config = AutoConfig.for_model(family, **(SMALL | FAMILIES.get(family, {})))
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path / "base")
        weights = checkpoint.read_any(tmp_path / "base").tensors
        adapter = make_adapter(tmp_path, weights, strength)
        recipes = [recipe(info, tmp_path / "base", adapter) for info in weights]
        return Case(tmp_path, recipes)

    return make


def make_adapter(folder, weights, strength):
    """A and B by the name of the matrix."""
    tensors = {}
    for info in weights:
        if len(info.shape) == 2:
            outputs, inputs = reversed(info.shape) if is_transposed(info) else info.shape
            tensors[f"{info.name}.a"] = torch.randn(2, inputs) * 0.1
            tensors[f"{info.name}.b"] = torch.randn(outputs, 2) * 0.1 * strength
    return stored(tensors, folder)


def is_transposed(tensor):
    """GPT-2's Conv1D."""
    return ".c_" in tensor.name


def stored(tensors, folder, name=ADAPTER):
    save_file(tensors, folder / name)
    return {info.name: Stored(info, folder) for info in read_header(folder / name)}


def recipe(info, folder, adapter):
    updates = ()
    if f"{info.name}.a" in adapter:
        a, b = adapter[f"{info.name}.a"], adapter[f"{info.name}.b"]
        factors = Factors(a=a, b=b, scaling=2.0, transposed=is_transposed(info))
        updates = (LowRank(adapter="lora", factors=factors),)
    return Recipe(info.name, info.shape, Plain(info.name, Stored(info, folder)), updates=updates)


def merge_one(recipe):
    blocks = []

    def room(rows, columns):
        blocks.append(torch.empty(rows, columns, dtype=torch_dtype(output_dtype(recipe))))
        return blocks[-1]

    with Inputs() as inputs:
        merge(recipe, inputs, room)
    return torch.cat(blocks).view(recipe.shape)


def summed(recipe):
    """base + adapter in fp32, the way it is written on paper."""
    with Inputs() as inputs:
        out = inputs.tensor(recipe.base.tensor).float()
        for update in recipe.updates:
            a, b = inputs.tensor(update.factors.a), inputs.tensor(update.factors.b)
            out += update.factors.scaling * ((b @ a).T if is_transposed(recipe) else b @ a)
    return out


def write(folder, base, tensors):
    folder.mkdir(exist_ok=True)
    shutil.copy(base / "config.json", folder)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


def only(name, **changes):
    """A change of one recipe's adapter."""
    return lambda recipe: recipe if recipe.name != name else replace(recipe, **changes)


def tokens_of(folder):
    """(ids, which are real) that a comparison of this model is about."""
    batch = tokenized(folder, PROMPTS, SMALL["vocab_size"])
    return batch.ids, batch.is_real


def of(case, name):
    return next(recipe for recipe in case.recipes if recipe.name == name)


def scaled(update, factor):
    return replace(update, factors=replace(update.factors, scaling=update.factors.scaling * factor))


# Its numbers


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_numbers_are_those_of_three_whole_models(case, family):
    made = case(family, torch.float32)  # so that norms and biases are rounded too, and differ
    out = made.merged()
    report = compare(made.recipes, out)
    ids, is_real = tokens_of(out)
    merged, adapted, base = (
        model(input_ids=ids, use_cache=False).logits[is_real].double()
        for model in (made.whole(out), made.whole(is_adapted=True), made.whole())
    )
    for found, other in ((report.merged, merged), (report.adapter, base)):
        difference = other - adapted
        assert found.relative == about((difference.norm(dim=-1) / adapted.norm(dim=-1)).mean())
        assert found.largest == about(difference.abs().max())
        kl = (adapted.softmax(-1) * (adapted.log_softmax(-1) - other.log_softmax(-1))).sum(-1).mean()
        assert found.kl == about(kl)
        assert found.top1 == about((other.argmax(-1) == adapted.argmax(-1)).double().mean())
    assert report.passed
    assert report.adapter.relative > 10 * report.merged.relative > 0


def about(number):
    return pytest.approx(float(number), rel=1e-3, abs=1e-8)


@torch.no_grad()
def test_every_decoder_layer_is_compared(case):
    made = case()
    out, heard = made.merged(), []
    report = compare(made.recipes, out, report=lambda *told: heard.append(told))
    ids, is_real = tokens_of(out)
    layers = [[], []]
    for model, found in zip((made.whole(out), made.whole(is_adapted=True)), layers, strict=True):
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _m, _i, output, to=found: to.append(output[is_real]))
        model(input_ids=ids)
    expected = [((m - a).norm(dim=-1) / a.norm(dim=-1)).mean() for m, a in zip(*layers, strict=True)]
    assert [name for name, _ in report.layers] == ["model.layers.0", "model.layers.1"]
    assert [difference for _, difference in report.layers] == [about(number) for number in expected]
    assert heard == list(report.layers)


def test_every_weight_is_compared_but_embeddings_that_no_prompt_has(case):
    made = case("llama")
    report = compare(made.recipes, made.merged())
    ids, _ = tokens_of(made.folder / "out")
    weights = sum(len(torch.empty(recipe.shape, device="meta").flatten()) for recipe in made.recipes)
    assert report.weights == weights - (60 - len(ids.unique())) * 32


# What passes


def test_an_adapter_so_weak_that_bf16_loses_it_is_no_wrong_merge(case):
    made = case(strength=1e-4)
    report = compare(made.recipes, made.merged())
    assert report.passed
    assert report.merged.relative == pytest.approx(report.adapter.relative, rel=0.01)


def test_updates_that_cannot_stand_beside_a_matrix_are_compared_too(case):
    made = case()
    tokens = stored({"rows": torch.randn(2, 32)}, made.folder, "tokens.safetensors")
    update = ReplaceRows(adapter="lora", values=tokens["rows"], rows=(3, 59))
    recipes = [only(EMBEDDING, updates=(update,))(recipe) for recipe in made.recipes]
    out = replace(made, recipes=recipes).merged()
    assert compare(recipes, out).passed
    assert not compare(made.recipes, out).passed


def test_an_adapter_on_stacked_experts_is_compared(case):
    made = case("gpt_oss")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    factors = {"a": torch.randn(4 * 2, 32), "b": torch.randn(48, 2 * 4)}
    adapter = stored(factors, made.folder, "experts.safetensors")
    update = ExpertsLowRank(adapter="lora", **adapter, experts=4, scaling=0.1, transposed=True)
    recipes = [only(name, updates=(update,))(recipe) for recipe in made.recipes]
    report = compare(recipes, replace(made, recipes=recipes).merged())
    assert report.passed
    assert [problem.split(":")[0] for problem in compare(recipes, made.merged()).problems] == [name]


def test_several_adapters_are_summed_and_rounded_once(case):
    made = case()
    recipes = [
        replace(recipe, updates=(*recipe.updates, *(scaled(update, -0.3) for update in recipe.updates)))
        for recipe in made.recipes
    ]
    assert compare(recipes, replace(made, recipes=recipes).merged()).passed


def test_weights_that_are_zero_and_get_sums_that_cancel_are_no_false_alarm(case):
    """There the order of an fp32 sum decides which of bf16's numbers is nearest."""
    made = case()
    zeros = stored({"base": torch.zeros(24, 32, dtype=torch.bfloat16)}, made.folder, "zeros.safetensors")
    b = torch.randn(24, 16)
    b = torch.cat([b, 0.01 * torch.randn(24, 16) - b], dim=1)
    a = torch.randn(16, 32).repeat(2, 1)
    tensors = stored({"a": a, "b": b}, made.folder, "cancel.safetensors")
    update = LowRank(adapter="lora", factors=Factors(a=tensors["a"], b=tensors["b"], scaling=0.7))
    change = only(UP, base=Plain(UP, zeros["base"]), updates=(update,))
    recipes = [change(recipe) for recipe in made.recipes]
    assert compare(recipes, replace(made, recipes=recipes).merged()).passed
    assert not compare(recipes, made.merged(only(UP, base=change(of(made, UP)).base))).passed


def test_a_slice_of_a_fused_matrix_has_its_slice_of_the_adapter(case):
    made = case("llama")
    whole = of(made, UP)
    part = replace(whole, shape=(12, 32), first_row=12, updates=(replace(whole.updates[0], first_row=12),))
    halves = {"down": replace(whole, shape=(12, 32)), "up": part}
    merged = torch.cat([merge_one(half) for half in halves.values()])
    assert torch.equal(merged, merge_one(whole))
    recipes = [only(UP, base=part.base, first_row=0)(recipe) for recipe in made.recipes]
    assert compare(recipes, made.merged()).passed


# What does not pass


def test_an_adapter_that_is_missing_from_one_matrix_is_found(case):
    made = case()
    report = compare(made.recipes, made.merged(only(UP, updates=())))
    assert [problem.split(":")[0] for problem in report.problems] == [UP]
    assert "of 768 weights" in report.problems[0]
    assert "added 0.00 times" in report.problems[0]


def test_an_adapter_that_was_added_twice_is_found(case):
    made = case()
    twice = compare(made.recipes, made.merged(lambda r: replace(r, updates=r.updates * 2)))
    matrices = [recipe.name for recipe in made.recipes if recipe.updates]
    assert {problem.split(":")[0] for problem in twice.problems} == set(matrices)
    assert all("added 2.00 times" in problem for problem in twice.problems)


@pytest.mark.parametrize("factor", [0.5, 2.0, 1.01])
def test_a_wrong_scaling_is_found(case, factor):
    made = case()
    updates = (scaled(of(made, UP).updates[0], factor),)
    report = compare(made.recipes, made.merged(only(UP, updates=updates)))
    assert [problem.split(":")[0] for problem in report.problems] == [UP]


def test_an_update_whose_halves_are_swapped_is_found(case):
    made = case()
    update = of(made, UP).updates[0]
    with Inputs() as inputs:
        swapped = stored({"b": inputs.tensor(update.factors.b).roll(12, 0)}, made.folder, "b.safetensors")
    wrong = replace(update, factors=replace(update.factors, b=swapped["b"]))
    report = compare(made.recipes, made.merged(only(UP, updates=(wrong,))))
    assert [problem.split(":")[0] for problem in report.problems] == [UP]
    assert "times" not in report.problems[0]


def test_a_shard_of_another_export_is_found(case):
    made = case()
    out = made.merged()
    tensors = load_file(out / FILE)
    norm = "model.layers.0.input_layernorm.weight"
    write(out, made.base, tensors | {n: torch.randn_like(tensors[n]) for n in (UP, norm, "lm_head.weight")})
    report = compare(made.recipes, out)
    assert {problem.split(":")[0] for problem in report.problems} == {UP, norm, "lm_head.weight"}
    assert not report.passed


def test_a_single_wrong_weight_is_found(case):
    made = case()
    out = made.merged()
    tensors = load_file(out / FILE)
    tensors[UP][5, 7] *= 1 + 2**-7  # bf16's next number
    write(out, made.base, tensors)
    report = compare(made.recipes, out)
    assert [problem.split(" weights")[0] for problem in report.problems] == [f"{UP}: 1 of 768"]


def test_what_is_not_a_number_does_not_pass(case):
    made = case()
    out = made.merged()
    tensors = load_file(out / FILE)
    tensors[UP][0, 0] = torch.nan
    write(out, made.base, tensors)
    report = compare(made.recipes, out)
    assert [problem.split(":")[0] for problem in report.problems] == [UP, "logits are not finite"]


def test_tensors_of_another_plan_are_refused_by_name_and_shape(case):
    made = case()
    out = made.merged()
    write(out, made.base, load_file(out / FILE) | {UP: torch.zeros(23, 32)})
    with pytest.raises(VerificationFailed, match=r"up_proj.weight: \[23, 32\] in the folder, \[24, 32\]"):
        compare(made.recipes, out)


# What it says


def test_it_says_in_sentences_and_in_json_what_it_found(case):
    made = case()
    right = compare(made.recipes, made.merged())
    assert f"differ by {right.merged.relative:.2%}" in right.sentences()[0]
    assert f"changes them by {right.adapter.relative:.2%}" in right.sentences()[0]
    assert "rounded to bf16 once" in right.sentences()[-1]
    found = json.loads(json.dumps(right.to_json()))
    assert found["passed"] is True
    assert found["layers"] == dict(right.layers)
    wrong = compare(made.recipes, made.merged(only(UP, updates=())))
    assert wrong.sentences()[-1] == f"{wrong.problems[0]}."


def test_who_listens_hears_every_layer_as_it_is_done(case):
    made, heard = case(), []
    found = compare(made.recipes, made.merged(), report=lambda *layer: heard.append(layer))
    assert tuple(heard) == found.layers
    assert [name for name, _ in heard] == ["model.layers.0", "model.layers.1"]


def test_who_listens_can_stop_it(case):
    made = case()

    def stop(*_):
        raise Stopped("SIGTERM")

    with pytest.raises(Stopped):
        compare(made.recipes, made.merged(), report=stop)


# Memory


def test_no_matrix_is_read_whole(case, monkeypatch):
    made = case("qwen3_moe")
    out, sizes = made.merged(), []
    rows = Inputs.rows
    monkeypatch.setattr(
        Inputs, "rows", lambda self, *args: sizes.append(rows(self, *args).numel()) or rows(self, *args)
    )
    assert compare(made.recipes, out).passed
    assert max(sizes) <= 200 < 8 * 32  # an expert's matrix


# Tokens


def test_prompts_are_tokens_of_the_models_own_tokenizer():
    batch = tokenized(DEMO, ["Hello", PROMPTS[0]], 3072)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert [row[real].tolist() for row, real in zip(batch.ids, batch.is_real, strict=True)] == [
        tokenizer("Hello")["input_ids"], tokenizer(PROMPTS[0])["input_ids"][: logits.TOKENS]
    ]  # fmt: skip
    assert not batch.are_random


@pytest.mark.parametrize("content", [None, "{", '{"model": {"type": "Unheard"}}'])
def test_without_a_tokenizer_that_can_be_read_the_tokens_are_random(case, content):
    made = case()
    out = made.merged()
    if content is not None:
        (out / "tokenizer.json").write_text(content)
    report = compare(made.recipes, out)
    assert (report.passed, report.tokens, report.are_random) == (True, 4 * 31, True)
    assert "124 random tokens" in report.sentences()[0]


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_a_signal_while_the_tokenizer_is_read_stops_the_run(monkeypatch, is_wrapped):
    def stopped(*_, **__):
        try:
            raise Stopped("SIGTERM")
        except Stopped as err:
            if not is_wrapped:
                raise
            raise OSError("cannot load") from err  # as transformers makes one error of another

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", stopped)
    with pytest.raises(Stopped):
        tokenized(DEMO, ["Hello"], 3072)


def test_tokens_that_the_embedding_lacks_are_left_out():
    batch = tokenized(DEMO, PROMPTS, 100)
    assert int(batch.ids.max()) < 100
    assert bool(batch.is_real[:, 0].all())


@pytest.mark.parametrize("words", range(1, 12))
def test_the_length_is_never_a_number_of_variants(words):
    """Or positions could be taken for a batch."""
    assert tokenized(DEMO, ["hello " * words], 3072).ids.shape[1] % 3


# What cannot be compared


@pytest.mark.parametrize(
    ("family", "more", "reason"),
    [
        ("mamba", {"state_size": 8}, "__rmatmul__"),
        ("llama4_text", {"num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 8}, "bmm"),
    ],
)
def test_a_forward_that_needs_whole_matrices_is_refused(case, monkeypatch, family, more, reason):
    monkeypatch.setitem(FAMILIES, family, more)
    made = case(family)
    with pytest.raises(NotComparable, match=f"calls torch's {reason} with a matrix") as caught:
        compare([replace(recipe, updates=()) for recipe in made.recipes], made.base)
    assert caught.value.exit_code == 42


def test_a_model_that_transformers_does_not_know_is_refused(case):
    made = case()
    out = made.merged()
    config = json.loads((out / "config.json").read_text()) | {"model_type": "qwen"}
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(NotComparable, match="transformers cannot build it"):
        compare(made.recipes, out)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3"])
def test_what_transformers_can_build_is_not_refused_before_merging(family):
    check_comparable("out", AutoConfig.for_model(family).to_dict())


@pytest.mark.parametrize("config", [{"model_type": "qwen"}, {"model_type": "t5"}, {}])
def test_what_transformers_cannot_build_is_refused_before_merging(config):
    with pytest.raises(NotComparable, match=r"out: .*has no causal language model"):
        check_comparable("out", config)


def test_to_ask_before_merging_imports_neither_transformers_nor_torch():
    code = (
        "import sys; from exporter.logits.compare import check_comparable; "
        "check_comparable('out', {'model_type': 'llama'}); print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
