"""Whole models, packed, against the same models before: what they compute, and that rows stay apart."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loader.kv_layout import KvGroup, KvLayout
from service.engine.cpu import packing
from service.engine.cpu.decoder import PackedDecoderLayer, PackedStack
from service.engine.cpu.modules import PackedEmbedding, PackedLinear, PackedMlp, PackedRmsNorm
from service.engine.cpu.packing import pack
from service.engine.rows import Row
from service.engine.runner import Runner

BLOCK = 32
VOCAB = 320
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "mistral": {"sliding_window": 40},
    "qwen2": {"tie_word_embeddings": True, "hidden_size": 128},
    "qwen3": {},
    "gemma": {"tie_word_embeddings": True},
    "gemma3_text": {"sliding_window": 40, "tie_word_embeddings": True},
    "phi3": {"hidden_size": 128},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [1],
    },
}  # fmt: skip
FUSED = ("llama", "mistral", "qwen2", "qwen3")


def model(family):
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    config.initializer_range = 0.15
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, parameter in made.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(std=0.1)
    return made.requires_grad_(False)


def layout(config, blocks=64):
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    if config.model_type == "mistral":
        windows = [config.sliding_window] * len(windows)
    groups = [
        KvGroup(window, tuple(i for i, w in enumerate(windows) if w == window), blocks)
        for window in dict.fromkeys(windows)
    ]
    return KvLayout(BLOCK, tuple(sorted(groups, key=lambda group: -(group.window or 1 << 30))))


def runner(made):
    return Runner(made, "cpu", 256, 8, 256, layout(made.config))


def row(ids, start=0, first_block=0, groups=1):
    blocks = list(range(first_block, first_block + 8))
    return Row(ids, start, (blocks,) * groups, True)


def prompt(length, seed):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits_of(over, *rows):
    return over.step(list(rows)).float().clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_model_computes_what_it_did(isa, kernels, family):
    over = runner(model(family))
    groups = len(over.layout.groups)
    before = [
        logits_of(over, row(prompt(90, 1), groups=groups)),
        logits_of(over, row([7], 90, groups=groups)),
    ]
    pack(over._model, kernels)
    after = [logits_of(over, row(prompt(90, 1), groups=groups)), logits_of(over, row([7], 90, groups=groups))]
    for mine, torchs in zip(after, before, strict=True):
        # Of numbers that bf16 rounds at every operation: a few steps of the largest logit's last place.
        assert (mine - torchs).abs().max() <= 0.03 * torchs.abs().max()
        assert mine.std() > 0.1


@pytest.mark.parametrize("rows", [1, 15, 33])
def test_a_whole_layer_stays_within_its_scratch(isa, kernels, monkeypatch, marked_scratch, rows):
    monkeypatch.setattr(packing, "Scratch", lambda: marked_scratch)
    over = runner(model("qwen2"))
    pack(over._model, kernels)
    over.step([row(prompt(rows, 1))])
    assert marked_scratch.kept


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tokens_logits_do_not_depend_on_the_batch_or_on_chunks(isa, kernels, family):
    made = model(family)
    over = runner(made)
    pack(over._model, kernels)
    groups = len(over.layout.groups)

    def at(first_block, ids, start=0):
        return row(ids, start, first_block, groups)

    ids = prompt(101, 2)
    whole = logits_of(over, at(0, ids))
    over.step([at(8, ids[:37])])
    in_chunks = logits_of(over, at(16, prompt(50, 3)), at(8, ids[37:], 37))[1:]
    assert torch.equal(whole, in_chunks)
    alone = logits_of(over, at(0, [9], 101))
    others = [at(24 + 8 * i, [i], 40) for i in range(4)]
    beside = logits_of(over, *others[:2], at(8, [9], 101), *others[2:])
    assert torch.equal(alone[0], beside[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_that_the_kernels_know_is_replaced(kernels, family):
    made = model(family)
    pack(runner(made)._model, kernels)
    left = [name for name, module in made.named_modules() if type(module) is nn.Linear]
    assert not left
    fused = [module for module in made.modules() if isinstance(module, PackedDecoderLayer)]
    assert len(fused) == (4 if family in FUSED else 0)
    assert isinstance(made.lm_head, PackedLinear)
    assert isinstance(made.get_input_embeddings(), PackedEmbedding) == made.config.tie_word_embeddings
    if family.startswith("gemma"):
        assert sum(isinstance(module, PackedMlp) for module in made.modules()) == 4
    else:
        assert isinstance(made.model.norm, PackedRmsNorm)


def test_a_rehearsal_computes_one_layer_and_later_steps_all_of_them(kernels, monkeypatch):
    made = model("qwen2")
    over, layers = runner(made), made.config.num_hidden_layers
    pack(made, kernels)
    counts, run = [], PackedStack.forward

    def counted(stack, *given, **options):
        counts.append(stack._run._count)
        return run(stack, *given, **options)

    monkeypatch.setattr(PackedStack, "forward", counted)
    over.rehearse()
    over.step([row(prompt(3, 0))])
    assert counts == [1, 1, layers]


def test_packing_takes_no_memory_for_a_second_copy(kernels):
    made = model("qwen2")
    matrices = {p.data_ptr() for p in made.parameters() if p.dim() == 2}
    pack(runner(made)._model, kernels)
    packed = [m for module in made.modules() for m in getattr(module, "_matrices", {}).values()]
    packed += [made.lm_head._matrix]
    assert {matrix.weight.data_ptr() for matrix in packed} == matrices
    assert len(packed) == 4 * 7 + 1


class OtherEmbedding(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids) + 0


@pytest.mark.parametrize("shared", ["embedding of another class", "one module twice", "one matrix twice"])
def test_a_matrix_that_somebody_else_reads_stays_right(kernels, shared):
    made = model("qwen2")
    layers = made.model.layers
    if shared == "embedding of another class":
        embedding = OtherEmbedding(VOCAB, 128, dtype=torch.bfloat16)
        embedding.weight = made.lm_head.weight
        made.set_input_embeddings(embedding)
    elif shared == "one module twice":
        layers[2].mlp = layers[1].mlp
    else:
        layers[2].mlp.down_proj.weight = layers[1].mlp.down_proj.weight
    over = runner(made)
    before = logits_of(over, row(prompt(60, 1)))
    pack(over._model, kernels)
    after = logits_of(over, row(prompt(60, 1)))
    assert (after - before).abs().max() <= 0.03 * before.abs().max()


def test_modules_with_hooks_of_their_own_are_not_replaced(kernels):
    made = model("qwen2")
    made.model.layers[0].register_forward_hook(lambda *_: None)
    made.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: None)
    pack(runner(made)._model, kernels)
    kinds = [type(layer).__name__ for layer in made.model.layers]
    assert kinds == ["Qwen2DecoderLayer", "Qwen2DecoderLayer", "PackedDecoderLayer", "PackedDecoderLayer"]
    assert type(made.model.layers[1].mlp.down_proj) is nn.Linear


def test_positions_that_are_not_side_by_side_are_read_right(kernels):
    made = model("qwen2")
    over = runner(made)
    pack(over._model, kernels)
    expected = logits_of(over, row(prompt(40, 1)))
    rotary = made.model.rotary_emb.forward

    def scattered(*given):
        return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in rotary(*given))

    made.model.rotary_emb.forward = scattered
    assert torch.equal(logits_of(over, row(prompt(40, 1))), expected)


def test_numbers_of_another_dtype_are_refused(kernels):
    made = model("qwen2")
    pack(runner(made)._model, kernels)
    with pytest.raises(TypeError, match="float32"):
        made.lm_head(torch.zeros(1, 128))


def test_offloaded_modules_stay_as_they_are(kernels):
    made = model("llama")
    made.model.layers[1].mlp.up_proj._hf_hook = object()
    plain = copy.deepcopy(made.model.layers[1].mlp.up_proj.weight)
    pack(runner(made)._model, kernels)
    kinds = [type(layer).__name__ for layer in made.model.layers]
    assert kinds == ["PackedDecoderLayer", "LlamaDecoderLayer", "PackedDecoderLayer", "PackedDecoderLayer"]
    assert torch.equal(made.model.layers[1].mlp.up_proj.weight, plain)
    assert isinstance(made.model.layers[1].mlp.down_proj, PackedLinear)


def test_float32_models_are_not_touched(kernels):
    made = model("llama").float()
    before = [name for name, _ in made.named_modules()]
    pack(runner(made)._model, kernels)
    assert [name for name, _ in made.named_modules()] == before
    assert not any(isinstance(module, PackedLinear) for module in made.modules())
