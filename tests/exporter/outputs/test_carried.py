"""carried.py: what goes into the output as it is. The oracle is transformers' AutoTokenizer."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from exporter.outputs.carried import Source, plan_files
from loader.errors import LfsPointer

DEMO = Path(__file__).parents[3] / "service" / "demo"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4976698672\n"
TALK = [{"role": "user", "content": "Hello, who are you?"}]
ADAPTERS = "{% for m in messages %}adapter {{ m['content'] }}{% endfor %}"
STALE = ("chat_template.jinja", "chat_template.json")


@pytest.fixture
def base(tmp_path):
    return folder(tmp_path / "base", DEMO)


@pytest.fixture
def adapter(tmp_path):
    """An adapter without a tokenizer."""
    return folder(tmp_path / "adapter")


def folder(path, tokenizer_of=None, **texts):
    """A folder with a tokenizer, and other files of these names ("_" for ".") and texts."""
    path.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if tokenizer_of:
            shutil.copy(tokenizer_of / name, path)
    write(path, **texts)
    return Source(path.name, path)


def write(path, **texts):
    for name, text in texts.items():
        (path / name.replace("_DOT_", ".")).write_text(text)


def grown(source, *tokens):
    """The folder's tokenizer with more tokens, as a trainer saves it."""
    tokenizer = Tokenizer.from_file(str(source.folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens])
    tokenizer.save(str(source.folder / "tokenizer.json"))
    return source


def names(carried):
    return [file.name for file in carried.files]


def copied(carried, out, base=DEMO):
    """The output with what is carried, and a config.json, which transformers looks into."""
    out.mkdir()
    shutil.copy(base / "config.json", out)
    for file in carried.files:
        (out / file.name).parent.mkdir(exist_ok=True)
        (out / file.name).write_bytes(file.read())
    return AutoTokenizer.from_pretrained(out)


def says(tokenizer):
    """What a tokenizer makes of a text and of a talk."""
    talk = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    return tokenizer("Hello <|im_start|> 名字 <mine>")["input_ids"], talk, tokenizer.eos_token_id


def test_the_bases_tokenizer_is_copied_byte_for_byte(base, adapter, tmp_path):
    carried = plan_files(base, [adapter])
    assert names(carried) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert (carried.tokenizer, carried.is_adapters, carried.notes) == (base.folder, False, ())
    assert says(copied(carried, tmp_path / "out")) == says(AutoTokenizer.from_pretrained(base.folder))
    for file in carried.files:
        assert file.read() == (base.folder / file.name).read_bytes()


def test_an_adapters_tokenizer_goes_before_the_bases(base, tmp_path):
    adapter = grown(folder(tmp_path / "adapter", DEMO), "<mine>")
    carried = plan_files(base, [adapter])
    assert (carried.tokenizer, carried.is_adapters) == (adapter.folder, True)
    assert says(copied(carried, tmp_path / "out")) == says(AutoTokenizer.from_pretrained(adapter.folder))
    assert says(AutoTokenizer.from_pretrained(base.folder)) != says(
        AutoTokenizer.from_pretrained(adapter.folder)
    )


def test_two_tokenizers_are_never_mixed(base, tmp_path):
    write(base.folder, added_tokens_DOT_json="{}", special_tokens_map_DOT_json="{}", vocab_DOT_json="{}")
    write(base.folder, merges_DOT_txt="", tokenizer_DOT_model="x")
    adapter = grown(folder(tmp_path / "adapter", DEMO), "<mine>")
    carried = plan_files(base, [adapter])
    assert names(carried) == ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert {file.source.parent for file in carried.files} == {adapter.folder}


def test_the_same_tokenizer_keeps_the_files_that_older_loaders_ask_for(base, tmp_path):
    write(base.folder, vocab_DOT_json="{}", merges_DOT_txt="", tokenizer_DOT_model="x")
    adapter = folder(tmp_path / "adapter", DEMO)
    write(adapter.folder, tokenizer_config_DOT_json='{"padding_side": "left"}')
    carried = plan_files(base, [adapter])
    places = {file.name: file.source.parent for file in carried.files}
    assert places == {
        "chat_template.jinja": adapter.folder, "tokenizer.json": adapter.folder,
        "tokenizer_config.json": adapter.folder, "vocab.json": base.folder, "merges.txt": base.folder,
        "tokenizer.model": base.folder,
    }  # fmt: skip


def test_an_adapter_with_a_tokenizers_config_only_has_no_tokenizer(base, adapter):
    write(adapter.folder, tokenizer_config_DOT_json="{}", special_tokens_map_DOT_json="{}")
    assert plan_files(base, [adapter]).tokenizer == base.folder


def test_of_several_tokenizers_it_is_the_one_with_most_tokens(base, tmp_path):
    small, large = folder(tmp_path / "small", DEMO), grown(folder(tmp_path / "large", DEMO), "<mine>")
    for order in ([small, large], [large, small]):
        carried = plan_files(base, order)
        assert carried.tokenizer == large.folder
        (note,) = carried.notes
        assert "large is taken, which knows 3,073 tokens" in note
        assert "small (3,072)" in note


def test_of_as_large_tokenizers_it_is_the_last(base, tmp_path):
    one, two = (grown(folder(tmp_path / name, DEMO), f"<{name}>") for name in ("one", "two"))
    assert plan_files(base, [one, two]).tokenizer == two.folder
    assert plan_files(base, [two, one]).tokenizer == one.folder


def test_the_same_tokenizer_twice_needs_no_note(base, tmp_path):
    one, two = (folder(tmp_path / name, DEMO) for name in ("one", "two"))
    assert plan_files(base, [one, two]).notes == ()


def test_an_adapters_smaller_tokenizer_is_noted(tmp_path):
    base = grown(folder(tmp_path / "base", DEMO), "<mine>")
    (note,) = plan_files(base, [folder(tmp_path / "adapter", DEMO)]).notes
    assert "adapter knows 3,072 tokens, and the base's 3,073" in note


def test_without_any_tokenizer_the_export_goes_on_with_a_loud_note(tmp_path, adapter):
    carried = plan_files(folder(tmp_path / "base", LICENSE="MIT"), [adapter])
    assert (names(carried), carried.tokenizer, carried.is_adapters) == (["LICENSE"], None, False)
    (note,) = carried.notes
    assert note.startswith("NO TOKENIZER")


# Chat templates: of the adapter in three places, over the base's in three places


TEMPLATES = {
    "as a file": {"chat_template.jinja": ADAPTERS},
    "in the config": {"tokenizer_config.json": json.dumps({"chat_template": ADAPTERS})},
    "as a list": {
        "tokenizer_config.json": json.dumps(
            {"chat_template": [{"name": "default", "template": ADAPTERS}, {"name": "rag", "template": "r"}]}
        )
    },
    "of a processor": {"chat_template.json": json.dumps({"chat_template": ADAPTERS})},
}


def put(source, texts):
    """Replace a folder's chat template; what its tokenizer_config.json says besides stays."""
    for name in STALE:
        (source.folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        path = source.folder / name
        if name == "tokenizer_config.json" and path.is_file():
            text = json.dumps(json.loads(path.read_text()) | json.loads(text))
        path.write_text(text)


@pytest.mark.parametrize("has_tokenizer", [True, False], ids=["tokenizer", "no tokenizer"])
@pytest.mark.parametrize("bases", TEMPLATES)
@pytest.mark.parametrize("own", [place for place in TEMPLATES if place != "of a processor"])
def test_an_adapters_chat_template_is_what_the_output_says(tmp_path, has_tokenizer, own, bases):
    base = folder(tmp_path / "base", DEMO)
    put(base, {name: text.replace("adapter", "base") for name, text in TEMPLATES[bases].items()})
    adapter = folder(tmp_path / "adapter", DEMO if has_tokenizer else None)
    put(adapter, TEMPLATES[own])
    tokenizer = copied(plan_files(base, [adapter]), tmp_path / "out")
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "adapter Hello, who are you?"


@pytest.mark.parametrize("bases", TEMPLATES)
def test_the_bases_chat_template_is_kept_when_the_adapters_tokenizer_has_none(tmp_path, bases):
    base = folder(tmp_path / "base", DEMO)
    put(base, TEMPLATES[bases])
    adapter = folder(tmp_path / "adapter", DEMO)
    put(adapter, {})
    carried = plan_files(base, [adapter])
    assert carried.tokenizer == adapter.folder
    tokenizer = copied(carried, tmp_path / "out")
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == "adapter Hello, who are you?"
    if bases == "as a list":
        assert tokenizer.chat_template["rag"] == "r"


def test_further_templates_go_with_the_first(base, tmp_path):
    (base.folder / "additional_chat_templates").mkdir()
    (base.folder / "additional_chat_templates" / "rag.jinja").write_text("r")
    tokenizer = copied(plan_files(base), tmp_path / "out")
    assert tokenizer.chat_template["rag"] == "r"
    adapter = folder(tmp_path / "adapter", chat_template_DOT_jinja=ADAPTERS)
    assert "additional_chat_templates/rag.jinja" not in names(plan_files(base, [adapter]))


def test_no_processors_template_contradicts_the_adapters(base, tmp_path):
    put(base, TEMPLATES["of a processor"])
    adapter = folder(tmp_path / "adapter", DEMO)
    put(adapter, TEMPLATES["in the config"])
    carried = plan_files(base, [adapter])
    assert "chat_template.json" not in names(carried)
    (template,) = [file for file in carried.files if file.name == "chat_template.jinja"]
    assert template.read().decode() == ADAPTERS


def test_a_template_without_a_tokenizer_is_carried_all_the_same(tmp_path):
    base = folder(tmp_path / "base", chat_template_DOT_jinja=ADAPTERS)
    assert names(plan_files(base)) == ["chat_template.jinja"]


# Everything else


def test_licences_and_processors_are_carried_and_weights_and_leftovers_are_not(base, adapter):
    kept = [
        "LICENSE", "LICENSE.md", "NOTICE", "Notice.txt", "USE_POLICY.md", "Tongyi Qianwen LICENSE AGREEMENT",
        "preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json",
    ]  # fmt: skip
    left = [
        "model.safetensors", "pytorch_model.bin", "model.gguf", "consolidated.00.pth", "params.json",
        "consolidated.safetensors", "model.safetensors.index.json", "README.md", "training_args.bin",
        "trainer_state.json", "optimizer.pt", "generation_config.json", "quantize_config.json",
        "quant_config.json", "hf_quant_config.json", "adapter_config.json", "adapter_model.safetensors",
        "modeling_qwen.py", "license_check.py", ".gitattributes",
    ]  # fmt: skip
    for name in kept + left:
        (base.folder / name).write_text(name)
        (adapter.folder / name).write_text(name)
    (base.folder / "checkpoint-500").mkdir()
    carried = plan_files(base, [adapter])
    found = set(names(carried))
    assert found == {*kept, "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert {file.source.parent for file in carried.files} == {base.folder}
    (note,) = carried.notes
    assert note.startswith("adapter has a licence of its own (LICENSE, LICENSE.md")


def test_processors_come_from_where_the_tokenizer_does(base, tmp_path):
    write(base.folder, preprocessor_config_DOT_json="base")
    adapter = folder(tmp_path / "adapter", DEMO, processor_config_DOT_json="adapter")
    assert [name for name in names(plan_files(base, [adapter])) if "processor" in name] == [
        "processor_config.json"
    ]


def test_code_is_carried_only_when_asked_for(base):
    write(base.folder, modeling_x_DOT_py="x = 1")
    config = json.loads((base.folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    (base.folder / "tokenizer_config.json").write_text(json.dumps(config))
    plain = plan_files(base)
    assert "modeling_x.py" not in names(plain)
    assert "names code of its own" in plain.notes[0]
    with_code = plan_files(base, keep_remote_code=True)
    assert "modeling_x.py" in names(with_code)
    assert with_code.notes == ()


def test_a_converted_vocabulary_is_left_to_its_converter(base):
    write(base.folder, LICENSE="MIT")
    carried = plan_files(base, tokenizer=False)
    assert names(carried) == ["LICENSE"]
    assert carried.notes == ()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "LICENSE", "vocab.json"])
def test_a_git_lfs_pointer_is_refused_before_anything_is_written(base, name):
    (base.folder / name).write_text(POINTER)
    with pytest.raises(LfsPointer, match=name):
        plan_files(base)


def test_a_damaged_tokenizer_config_is_carried_as_it_is(base):
    write(base.folder, tokenizer_config_DOT_json="{")
    assert "tokenizer_config.json" in names(plan_files(base))
