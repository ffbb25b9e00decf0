import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from service.prompt.template import BadChatTemplate, ChatTemplate, NoChatTemplate, TemplateRefused

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be first') }}{% endif %}"
    "{% if loop.last and m.role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '[' + m.role + ']' + m.content }}{% endfor %}"
)
ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture
def tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


def rendered(tokenizer, template, messages):
    return tokenizer.decode(template.encode(messages))


def test_messages_are_rendered_up_to_where_the_answer_begins(tokenizer):
    template = ChatTemplate(tokenizer, "m")
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(tokenizer, template, ASK) == text
    assert template.encode(ASK)[0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_developer_becomes_system_where_the_template_lacks_it(tokenizer):
    developer = [{"role": "developer", "content": "be brief"}, *ASK]
    assert "system\nbe brief" in rendered(tokenizer, ChatTemplate(tokenizer, "m"), developer)
    tokenizer.chat_template = CHATML + "{# knows developer #}"
    assert "developer\nbe brief" in rendered(tokenizer, ChatTemplate(tokenizer, "m"), developer)


def test_system_messages_move_to_the_front_where_the_template_insists(tokenizer):
    tokenizer.chat_template = ALTERNATING
    messages = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *ASK]
    assert rendered(tokenizer, ChatTemplate(tokenizer, "m"), messages) == "[system]a\n\nb[user]hi"


def test_a_refusal_is_in_the_templates_own_words(tokenizer):
    tokenizer.chat_template = ALTERNATING
    with pytest.raises(TemplateRefused, match="roles must alternate"):
        ChatTemplate(tokenizer, "m").encode([*ASK, {"role": "assistant", "content": "hello"}])


def test_the_token_that_ends_a_turn_is_found_in_the_template(tokenizer):
    assert ChatTemplate(tokenizer, "m").end_ids() == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_template_without_an_end_token_has_none(tokenizer):
    tokenizer.chat_template = ALTERNATING
    assert ChatTemplate(tokenizer, "m").end_ids() == frozenset()


def test_a_file_overrides_the_models_template(tokenizer, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("<{{ messages[0].content }}>", encoding="utf-8")
    tokenizer.chat_template = None
    assert rendered(tokenizer, ChatTemplate(tokenizer, "m", file), ASK) == "<hi>"


def test_a_model_without_a_template_stops_the_start_and_names_the_flag(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(NoChatTemplate, match="--chat-template FILE") as refused:
        ChatTemplate(tokenizer, "some/model")
    assert refused.value.exit_code == 42


def test_a_broken_template_stops_the_start_and_names_its_file(tokenizer, tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for %}", encoding="utf-8")
    with pytest.raises(BadChatTemplate, match=r"own\.jinja"):
        ChatTemplate(tokenizer, "m", file)


@pytest.mark.parametrize("text", ["", "hi", "word " * 50, "\U0001f600\u4f60" * 40])
def test_the_least_that_a_text_can_take_is_never_more_than_it_takes(tokenizer, text):
    template = ChatTemplate(tokenizer, "source")
    messages = [{"role": "user", "content": text}]
    assert template.least_tokens(messages) <= len(template.encode(messages))
    assert template.least_tokens([{"role": "user", "content": "x" * 100_000}]) > 1000
