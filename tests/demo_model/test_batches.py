import torch

from demo_model import tokenizer as bpe
from demo_model.batches import batches, encode

DIALOGUES = [
    [{"role": "user", "content": "hi" * n}, {"role": "assistant", "content": "hello " * (n % 3 + 1)}]
    for n in range(1, 40)
]
TOKENIZER = bpe.build([message["content"] for dialogue in DIALOGUES for message in dialogue], 300)


def test_the_answer_and_its_end_are_learnt_and_nothing_else():
    ((ids, learnt),) = encode(TOKENIZER, [DIALOGUES[0]])
    wanted = [id_ for id_, use in zip(ids, learnt, strict=True) if use]
    assert TOKENIZER.decode(wanted, skip_special_tokens=False) == "hello hello <|im_end|>"


def test_the_ids_are_those_of_the_chat_template(tmp_path):
    from transformers import AutoTokenizer

    bpe.save(TOKENIZER, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for dialogue, (ids, _) in zip(DIALOGUES, encode(TOKENIZER, DIALOGUES), strict=True):
        assert tokenizer.apply_chat_template(dialogue, return_dict=False) == ids


def test_every_dialogue_is_in_one_batch_with_padding_on_the_right():
    examples = encode(TOKENIZER, DIALOGUES)
    seen = []
    for ids, mask in batches(examples, tokens=200, pad=0, seed=1):
        assert ids.shape == mask.shape
        for row, wanted in zip(ids.tolist(), mask, strict=True):
            length = len(row) - next((n for n, id_ in enumerate(reversed(row)) if id_), len(row))
            seen.append(row[:length])
            assert not torch.any(wanted[length:])
    assert sorted(seen) == sorted(ids for ids, _ in examples)
