"""exporter/adapters/adapter.py and adapter_config.py: what an adapter is, and what of it cannot be merged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from exporter.adapters import config as adapter_config
from exporter.adapters.adapter import base_identity_notes, read
from exporter.errors import BadAdapter
from loader.errors import EXIT_BAD_INPUT, HubError, LfsPointer, TruncatedShard

Q = {"target_modules": ["q_proj"]}


@pytest.fixture
def adapter(tiny_qwen2, make_adapter):
    return make_adapter(tiny_qwen2, **Q)


def refusal(folder):
    with pytest.raises(BadAdapter) as caught:
        read(str(folder))
    assert caught.value.exit_code == EXIT_BAD_INPUT
    return str(caught.value)


def test_an_adapter_is_its_config_and_the_header_of_its_tensors(adapter):
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "chat_template.jinja").write_text("")
    found = read(str(adapter), 0.5)
    assert found.weight == 0.5
    assert found.kind == "LoRA, r=4, alpha=6"
    assert {stored.name for stored in found.tensors} == set(load_file(adapter / "adapter_model.safetensors"))
    assert found.tokenizer_files == ("chat_template.jinja", "tokenizer.json")


# Places


def test_what_is_no_folder_and_no_hub_id_is_refused():
    assert "no such folder" in refusal("not/an/adapter")


def test_a_file_is_refused_with_the_folder_to_give(adapter):
    assert f"Give the adapter's folder: {adapter}" in refusal(adapter / "adapter_config.json")


def test_a_model_is_refused_as_an_adapter(tiny_qwen2):
    assert "give it as --base" in refusal(tiny_qwen2).lower()


def test_a_folder_of_checkpoints_says_which_holds_the_adapter(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "run" / "checkpoint-20")
    assert f"{tmp_path / 'run' / 'checkpoint-20'}" in refusal(tmp_path / "run")


def test_an_adapter_on_the_hub_is_downloaded_at_its_revision(adapter, monkeypatch):
    asked = []

    def download(repo, **options):
        asked.append((repo, options["revision"]))
        return str(adapter)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert read("owner/name@v1").folder == adapter
    assert read("owner/name").source == "owner/name"
    assert asked == [("owner/name", "v1"), ("owner/name", None)]


def test_a_hub_that_fails_is_told_as_for_models(monkeypatch):
    def download(repo, **options):
        raise OSError("disk full")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(HubError, match="disk full"):
        read("owner/name")


# Files


def test_a_pickle_is_never_opened_and_the_way_to_convert_it_works(adapter, tmp_path, monkeypatch):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, adapter / "adapter_model.bin")
    message = refusal(adapter)
    command = message.split('python -c "')[1].removesuffix('"')
    monkeypatch.chdir(adapter)
    exec(command)
    assert len(read(str(adapter)).tensors) == len(tensors)


def test_missing_weights_are_refused(adapter):
    (adapter / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in refusal(adapter)


@pytest.mark.parametrize("content", ["{", "[]", '"LORA"'])
def test_a_config_that_is_no_object_is_refused(adapter, content):
    (adapter / "adapter_config.json").write_text(content)
    assert "adapter_config.json" in refusal(adapter)


def test_a_pointer_of_git_lfs_is_told_from_the_file(adapter):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (adapter / "adapter_model.safetensors").write_text(pointer)
    with pytest.raises(LfsPointer):
        read(str(adapter))


def test_a_file_cut_short_is_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(TruncatedShard):
        read(str(adapter))


def test_tensors_saved_before_they_were_gathered_are_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({name: torch.empty(0) for name in load_file(file)}, file)
    message = refusal(adapter)
    assert "4 of 4 tensors are empty" in message
    assert "gathered" in message


def test_an_adapter_of_no_tensors_is_refused(adapter):
    save_file({}, adapter / "adapter_model.safetensors")
    assert "holds no tensors" in refusal(adapter)


def test_tensors_that_are_no_floats_are_refused(adapter):
    file = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(file).items()}, file)
    assert "is I8" in refusal(adapter)


# Kinds


@pytest.mark.parametrize("kind", ["ADALORA", "VERA", "LOHA", "LOKR", "OFT", "IA3", "PROMPT_TUNING", "NEW"])
def test_other_kinds_are_refused_by_name(adapter, edit_config, kind):
    edit_config(adapter, peft_type=kind)
    assert f"peft_type {kind}" in refusal(adapter)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 3}),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("megatron_config", {"a": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("use_qalora", True),
        ("velora_config", {"num_groups": 64}),
        ("something_new", 0.1),
    ],
)
def test_a_variant_that_would_merge_to_something_else_is_refused_by_name(adapter, edit_config, key, value):
    edit_config(adapter, **{key: value})
    assert key in refusal(adapter)
    for nothing in (None, False, {}, [], "", 0):
        edit_config(adapter, **{key: nothing})
        read(str(adapter))


@pytest.mark.parametrize("method", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_changed_the_base_is_refused(adapter, edit_config, method):
    edit_config(adapter, init_lora_weights=method)
    assert "changed the base's weights" in refusal(adapter)


@pytest.mark.parametrize("method", [True, False, "gaussian", "eva", "orthogonal"])
def test_an_initialisation_that_left_the_base_alone_is_merged(adapter, edit_config, method):
    edit_config(adapter, init_lora_weights=method)
    read(str(adapter))


def test_an_unknown_initialisation_is_refused(adapter, edit_config):
    edit_config(adapter, init_lora_weights="mica")
    assert "init_lora_weights is 'mica'" in refusal(adapter)


def test_every_key_that_peft_writes_is_known():
    """A newer peft: read what its new key does to a merge, then name it in adapter_config.py."""
    from peft import LoraConfig

    known = adapter_config._MERGED | adapter_config._INFORMATIONAL | adapter_config._VARIANTS.keys()
    assert set(LoraConfig().to_dict()) <= known


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0}, {"r": "8"}, {"r": 2.5}, {"lora_alpha": None}, {"lora_alpha": float("nan")},
        {"rank_pattern": {"q_proj": -1}}, {"alpha_pattern": ["q_proj"]}, {"rank_pattern": {"(": 4}},
        {"lora_alpha": 10**400},
    ],
)  # fmt: skip
def test_numbers_that_make_no_sense_are_refused(adapter, edit_config, changes):
    edit_config(adapter, **changes)
    assert next(iter(changes)) in refusal(adapter)


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("modules_to_save", 5, "a list of names"),
        ("modules_to_save", "lm_head", "a list of names"),
        ("modules_to_save", [5], "a list of names"),
        ("target_parameters", 5, "a list of names"),
        ("target_parameters", "experts.down_proj", "a list of names"),
        ("trainable_token_indices", 5, "a list of rows"),
        ("trainable_token_indices", "1, 2", "a list of rows"),
        ("trainable_token_indices", [1, "2"], "a list of rows"),
        ("trainable_token_indices", {"lm_head": 5}, "a list of rows"),
        ("rank_pattern", 5, "an object of patterns"),
        ("rank_pattern", "q_proj", "an object of patterns"),
        ("alpha_pattern", 5, "an object of patterns"),
        ("alpha_pattern", {"q_proj": "8"}, "a number"),
        ("use_rslora", "false", "true or false"),
        ("use_dora", [1], "true or false"),
    ],
)
def test_a_value_of_another_type_is_refused_with_key_and_value(adapter, edit_config, key, value, wanted):
    edit_config(adapter, **{key: value})
    message = refusal(adapter)
    inner = value["q_proj"] if key == "alpha_pattern" and isinstance(value, dict) else value
    assert key in message
    assert f"is {inner!r}; it must be {wanted}" in message


def test_a_long_wrong_value_is_told_in_part(adapter, edit_config):
    edit_config(adapter, modules_to_save="x" * 10_000)
    assert len(refusal(adapter)) < 500


def test_a_pattern_is_found_as_peft_finds_it():
    from peft.utils.other import get_pattern_key

    patterns = {
        "layers.1": 1, "k_proj": 2, r".*\.0\.self_attn\.q_proj": 3, "self_attn.(q|v)_proj": 4, "_proj": 5,
    }  # fmt: skip
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "a.xk_proj", "k_proj"):
        expected = patterns.get(get_pattern_key(patterns, path), 8)
        assert adapter_config.rank({"rank_pattern": patterns}, path) == expected


# Whose base


def named(adapter, edit_config, base):
    edit_config(adapter, base_model_name_or_path=base)
    return read(str(adapter))


@pytest.mark.parametrize("path", ["/x/models/Qwen2-7B/", "/x/hub/models--Qwen--Qwen2-7B/snapshots/0123abcd"])
def test_the_same_base_by_another_path_needs_no_note(adapter, edit_config, path):
    found = named(adapter, edit_config, path)
    assert base_identity_notes([found], "qwen/qwen2-7b@main", None) == []


def test_another_base_is_noted(adapter, edit_config):
    (note,) = base_identity_notes([named(adapter, edit_config, "Qwen/Qwen2-1.5B")], "./Qwen2-7B", None)
    assert "Qwen/Qwen2-1.5B" in note
    assert "--base is Qwen2-7B:" in note


def test_a_note_holds_no_path_of_this_machine_or_the_trainers(adapter, edit_config):
    found = named(adapter, edit_config, "/home/trainer/models/tiny-gptq")
    for method in (None, "awq"):
        (note,) = base_identity_notes([found], "/mnt/disk/tiny", method)
        assert "tiny-gptq" in note
        assert adapter.name in note
        assert "/" not in note


@pytest.mark.parametrize("name", ["Qwen-7B-Chat-Int4", "Llama-3-8B-bnb-4bit", "m-AWQ", "x.gptq", "q-nf4"])
def test_a_quantized_base_in_training_is_noted_with_both_ways_to_export(adapter, edit_config, name):
    found = named(adapter, edit_config, f"owner/{name}")
    (note,) = base_identity_notes([found], "owner/model", None)
    assert f"--base owner/{name} --original-base owner/model" in note
    (note,) = base_identity_notes([found], "owner/model", "gptq")
    assert "--original-base" not in note


def test_a_name_that_only_looks_quantized_is_not_called_so(adapter, edit_config):
    found = named(adapter, edit_config, "owner/print4-model")
    (note,) = base_identity_notes([found], "owner/model", None)
    assert "quantized" not in note


def test_a_config_of_another_trainer_is_read_with_pefts_defaults(adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({"peft_type": "lora", "lora_dtype": "float32", "revision": None}))
    found = read(str(adapter))
    assert found.trained_on is None
    assert adapter_config.scaling(found.config, "model.layers.0.self_attn.q_proj") == 1
