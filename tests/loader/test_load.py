"""loader/load.py: a loaded model computes what from_pretrained's does, wherever its weights are."""

import gc
import re
import weakref
from collections import Counter
from functools import cache

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from loader import checkpoint, probe
from loader.budget import MemoryBudget
from loader.errors import BudgetExceeded, DeviceUnavailable, TruncatedShard, UnsupportedModel
from loader.load import load
from loader.plan import make_plan
from loader.probe import Machine
from loader.shards import ShardReader
from loader.weights import CheckpointWeights

PLENTY = 10**9
IDS = torch.arange(2, 26).unsqueeze(0)  # longer than every window
SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {
    "qwen2": {},
    "qwen2, tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "llama": {},
    "mistral": {"sliding_window": 13},
    "gemma2": {"sliding_window": 9, "head_dim": 8, "tie_word_embeddings": True},
    "gemma3_text": {
        "sliding_window": 9, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": True,
    },
    "phi": {},
    "phi3": {},
    "qwen3_moe": {"num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    "mixtral": {"num_local_experts": 12},
    "lfm2": {"layer_types": ["conv", "full_attention"], "tie_embedding": True},
    "qwen3_5_text": {
        "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def only_new_garbage():
    """Loading and closing collect garbage, which takes long among all that transformers has imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved("qwen2, tied")`: the folder of a random model, written once."""
    made = {}

    def save(name, dtype=torch.float32):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp(re.sub(r"\W+", "-", name))
            torch.manual_seed(7)
            config = AutoConfig.for_model(name.split(",")[0], **(SMALL | MODELS[name]))
            config.initializer_range = 0.3
            AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
            made[name, dtype] = folder
        return made[name, dtype]

    return save


@pytest.fixture
def loaded_from():
    """`loaded_from(folder)`: a LoadedModel with room for everything; closed at the end."""
    opened = []

    def open_model(folder, budget_bytes=PLENTY, dtype="auto", progress=None):
        opened.append(load(plan_for(folder, budget_bytes, dtype), progress))
        return opened[-1]

    yield open_model
    for loaded in opened:
        loaded.close()


def plan_for(folder, budget_bytes=PLENTY, dtype="auto"):
    return make_plan(checkpoint.read(folder), MemoryBudget(("cpu",), {"cpu": budget_bytes}), dtype=dtype)


def smallest(folder, dtype="auto"):
    """The budget below which there is no plan: everything that may leave has left."""
    with pytest.raises(BudgetExceeded) as caught:
        plan_for(folder, 1, dtype)
    return caught.value.smallest_bytes


def logits(model):
    with torch.inference_mode():
        return model(input_ids=IDS).logits


@cache
def expected_logits(folder, dtype="auto"):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def held_bytes(model):
    """Of parameters and buffers, each once; those that are elsewhere are not among them."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors if t.device.type != "meta"}.values())


def open_shards():
    return [file.path for file in psutil.Process().open_files() if file.path.endswith(".safetensors")]


# The same model


@pytest.mark.parametrize("name", MODELS)
def test_a_resident_model_has_the_planned_bytes_and_transformers_logits(saved, loaded_from, name):
    folder = saved(name)
    loaded = loaded_from(folder)
    assert loaded.plan.offloaded_bytes == 0
    assert held_bytes(loaded.model) == loaded.plan.resident_bytes
    assert torch.equal(logits(loaded.model), expected_logits(folder))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_is_mostly_on_disk_has_the_same_logits(saved, loaded_from, name):
    folder = saved(name)
    loaded = loaded_from(folder, smallest(folder))
    assert loaded.plan.offloaded_bytes > loaded.plan.weights_bytes / 3
    for _ in range(2):  # what was read for one forward is read again for the next
        assert held_bytes(loaded.model) == loaded.plan.resident_bytes
        assert torch.equal(logits(loaded.model), expected_logits(folder))


@pytest.mark.parametrize(
    ("stored_as", "asked_for"),
    [
        (torch.float32, "bfloat16"),
        (torch.float32, "float16"),
        (torch.bfloat16, "float32"),
        (torch.bfloat16, "auto"),
    ],
)
def test_a_dtype_that_is_asked_for_is_what_every_parameter_has(saved, loaded_from, stored_as, asked_for):
    folder = saved("qwen2", stored_as)
    dtype = stored_as if asked_for == "auto" else getattr(torch, asked_for)
    for budget_bytes in (PLENTY, smallest(folder, asked_for)):
        model = loaded_from(folder, budget_bytes, asked_for).model
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert torch.equal(logits(model), expected_logits(folder, dtype))


def test_a_model_in_many_shards_is_the_same(saved, loaded_from, tmp_path):
    folder = saved("qwen2, tied")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path, max_shard_size=30_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    for budget_bytes in (PLENTY, smallest(tmp_path)):
        assert torch.equal(logits(loaded_from(tmp_path, budget_bytes).model), expected_logits(folder))


# Where the weights are


def test_resident_weights_are_views_of_one_buffer(saved, loaded_from):
    model = loaded_from(saved("qwen3_moe")).model
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == 1
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


def test_tied_weights_stay_tied(saved, loaded_from):
    folder = saved("qwen2, tied")
    for budget_bytes in (PLENTY, smallest(folder)):
        model = loaded_from(folder, budget_bytes).model
        assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


@pytest.mark.parametrize("name", ["qwen2", "qwen2, tied", "mixtral"])
def test_only_offloaded_weights_are_read_for_a_forward_and_each_once(saved, loaded_from, monkeypatch, name):
    loaded = loaded_from(saved(name), smallest(saved(name)))
    offloaded = [n for n, p in loaded.model.named_parameters() if p.device.type == "meta"]
    reads, real = Counter(), CheckpointWeights.__getitem__
    monkeypatch.setattr(CheckpointWeights, "__getitem__", lambda self, n: reads.update([n]) or real(self, n))
    logits(loaded.model)
    assert offloaded
    assert reads == Counter(offloaded)


def test_nothing_offloaded_is_kept_between_forwards(saved, loaded_from, monkeypatch):
    loaded = loaded_from(saved("qwen2"), smallest(saved("qwen2")))
    resident = {n: p.data_ptr() for n, p in loaded.model.named_parameters() if p.device.type != "meta"}
    alive, most = weakref.WeakSet(), []
    real = CheckpointWeights.__getitem__

    def watched(self, name):
        tensor = real(self, name)
        alive.add(tensor.untyped_storage())
        most.append(sum(storage.nbytes() for storage in alive))
        return tensor

    monkeypatch.setattr(CheckpointWeights, "__getitem__", watched)
    logits(loaded.model)
    assert len(most) > 20
    assert max(most) == loaded.plan.devices[0].staging_bytes
    gc.collect()
    assert not alive
    assert resident == {
        n: p.data_ptr() for n, p in loaded.model.named_parameters() if p.device.type != "meta"
    }


# Progress


@pytest.mark.parametrize("squeezed", [False, True], ids=["resident", "offloaded"])
def test_progress_goes_from_nothing_to_all_that_stays_and_never_back(saved, loaded_from, squeezed):
    folder, seen = saved("qwen2"), []
    loaded = loaded_from(
        folder, smallest(folder) if squeezed else PLENTY, progress=lambda *bytes_: seen.append(bytes_)
    )
    done = [done_bytes for done_bytes, _ in seen]
    total_bytes = sum(p.nbytes for p in loaded.model.parameters() if p.device.type != "meta")
    assert {total for _, total in seen} == {total_bytes}
    assert (done[0], done[-1]) == (0, total_bytes)
    assert done == sorted(set(done))


def test_whatever_progress_raises_stops_the_load_and_closes_the_shards(saved, monkeypatch):
    class Enough(BaseException):
        pass

    def progress(done_bytes, total_bytes):
        if done_bytes > total_bytes / 2:
            assert open_shards()
            monkeypatch.delattr(ShardReader, "read_into")
            raise Enough

    with pytest.raises(Enough):
        load(plan_for(saved("qwen2")), progress)
    assert open_shards() == []


def test_a_load_that_fails_leaves_no_model_behind(saved):
    seen = []

    def progress(done_bytes, total_bytes):
        seen.append(weakref.ref(next(x for x in gc.get_objects() if type(x).__name__ == "Qwen2ForCausalLM")))
        raise KeyboardInterrupt

    gc.collect()
    with pytest.raises(KeyboardInterrupt):
        load(plan_for(saved("qwen2")), progress)
    gc.collect()
    assert [alive() for alive in seen] == [None]


# Closing


def test_closing_gives_the_memory_back(tmp_path):
    config = AutoConfig.for_model("llama", **(SMALL | {"hidden_size": 512, "intermediate_size": 8192}))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    loaded = load(plan_for(tmp_path))
    weights_bytes = loaded.plan.weights_bytes
    held = psutil.Process().memory_info().rss
    assert weights_bytes > 50_000_000
    assert 0.95 * weights_bytes < loaded.measured_peak_bytes()["cpu"] < 1.2 * weights_bytes
    loaded.close()
    assert held - psutil.Process().memory_info().rss > 0.9 * weights_bytes
    assert loaded.model is None


@pytest.mark.parametrize("squeezed", [False, True], ids=["resident", "offloaded"])
def test_nothing_of_a_closed_model_is_left(saved, squeezed):
    folder = saved("qwen2")
    loaded = load(plan_for(folder, smallest(folder) if squeezed else PLENTY))
    logits(loaded.model)
    parts = [weakref.ref(loaded.model), *map(weakref.ref, loaded.model.modules())]
    loaded.close()
    loaded.close()
    assert not [part for part in parts if part() is not None]
    assert open_shards() == []


# What cannot be loaded


def test_a_plan_for_a_gpu_that_is_not_here_is_refused_before_anything_is_read(saved, monkeypatch):
    device = f"cuda:{torch.cuda.device_count()}"
    plan = make_plan(checkpoint.read(saved("qwen2")), MemoryBudget((device,), {device: 2 * PLENTY}))
    monkeypatch.delattr(ShardReader, "__init__")
    with pytest.raises(DeviceUnavailable, match=f"the plan is for {device} and torch sees") as caught:
        load(plan)
    assert caught.value.exit_code == 43


def test_a_plan_for_more_than_is_free_is_refused_with_the_way_out(saved, monkeypatch):
    plan = plan_for(saved("qwen2"))
    monkeypatch.setattr(probe, "machine", lambda: Machine(2**30, plan.devices[0].peak_bytes - 1))
    with pytest.raises(
        DeviceUnavailable, match="Raise the memory limit if this is a container, end"
    ) as caught:
        load(plan)
    assert "`snugfit plan` tells the smallest that works" in str(caught.value)


def test_what_transformers_cannot_build_is_unsupported(saved, tmp_path):
    text = (saved("qwen2") / "config.json").read_text(encoding="utf-8")
    (tmp_path / "config.json").write_text(text.replace('"silu"', '"tanhshrink3"'), encoding="utf-8")
    (tmp_path / "model.safetensors").symlink_to(saved("qwen2") / "model.safetensors")
    with pytest.raises(UnsupportedModel, match="tanhshrink3"):
        load(plan_for(tmp_path))


def test_a_shard_that_was_cut_after_planning_is_refused_and_closed(saved, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((saved("qwen2") / name).read_bytes())
    plan = plan_for(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size // 2)
    with pytest.raises(TruncatedShard):
        load(plan)
    assert open_shards() == []


def test_a_model_is_not_changed_by_loading_it(saved, loaded_from):
    file = saved("llama") / "model.safetensors"
    before = {name: tensor.clone() for name, tensor in load_file(file).items()}
    loaded_from(saved("llama"))
    after = load_file(file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
