"""`model.generate` is the oracle: whatever the cache does, greedy tokens in float32 must be the same."""

import gc

import pytest
import torch
from transformers import DynamicCache

from loader.checkpoint import ModelSpec
from loader.footprint import measure
from loader.kv_layout import KvGroup, KvLayout
from service.engine.cache import CacheOverflow, FixedCache
from service.engine.rows import Row
from service.engine.single import SingleRunner
from service.engine.types import DeviceLost

FAMILIES = ("lfm2", "qwen3_5_text", "qwen2", "mistral", "gemma2", "gemma3_text", "qwen3_moe")
CONTEXT, CHUNK = 96, 8


def prompt(length, seed=1):
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generated(model, ids, tokens):
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


def row(ids, start, sample=True):
    return Row(ids, start, ([0] * -(-CONTEXT // 8),), sample)


def stepped(runner, ids, tokens):
    """Greedy tokens, the prompt read in chunks."""
    for at in range(0, len(ids), CHUNK):
        logits = runner.step([row(ids[at : at + CHUNK], at, sample=at + CHUNK >= len(ids))])
    chosen = []
    for at in range(len(ids), len(ids) + tokens):
        chosen.append(int(logits[0].argmax()))
        if len(chosen) < tokens:
            logits = runner.step([row(chosen[-1:], at)])
    return chosen


def runner_of(model, context=CONTEXT, chunk=CHUNK):
    layout = KvLayout(8, (KvGroup(None, tuple(range(4)), -(-context // 8)),))
    return SingleRunner(model, "cpu", context, chunk, layout)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate_whatever_the_prompt_length(tiny, family):
    runner = runner_of(tiny(family))
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 37):
        ids = prompt(length)
        assert stepped(runner, ids, 30) == generated(tiny(family), ids, 30), length


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_that_starts_at_0_finds_nothing_of_the_sequence_before(tiny, family):
    runner = runner_of(tiny(family))
    fresh = stepped(runner, prompt(20), 10)
    stepped(runner, prompt(60, seed=2), 30)
    assert stepped(runner, prompt(20), 10) == fresh


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rehearsal_changes_no_answer(tiny, family):
    runner = runner_of(tiny(family))
    runner.rehearse()
    ids = prompt(30)
    assert stepped(runner, ids, 20) == generated(tiny(family), ids, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_has_exactly_the_bytes_that_were_planned(tiny, family):
    spec = ModelSpec(family, None, tiny(family).config.to_dict(), ())
    assert runner_of(tiny(family)).kv_bytes == measure(spec, "float32").kv_bytes(CONTEXT, CHUNK)


def test_one_request_at_a_time_and_no_prefix_of_another(tiny):
    runner = runner_of(tiny())
    assert runner.concurrency == 1
    assert not runner.prefix_reuse
    assert runner.one_state
    with pytest.raises(ValueError, match="too many values"):
        runner.step([row([1], 0), row([2], 0)])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_which_ids_it_can_read(tiny, family):
    runner = runner_of(tiny(family))
    assert runner.vocab == 300
    runner.step([row([runner.vocab - 1], 0)])
    with pytest.raises(IndexError):
        runner.step([row([runner.vocab], 0)])


def test_a_row_that_does_not_sample_gives_no_logits(tiny):
    runner = runner_of(tiny())
    assert runner.step([row(prompt(5), 0, sample=False)]).shape == (0, 300)
    assert runner.step([row([7], 5)]).shape == (1, 300)


def test_a_row_that_does_not_follow_what_the_cache_holds_is_refused(tiny):
    runner = runner_of(tiny())
    runner.step([row(prompt(5), 0)])
    with pytest.raises(ValueError, match="starts at 6 and the cache holds 5"):
        runner.step([row([1], 6)])


def test_a_full_context_can_be_used_to_the_last_token(tiny):
    runner = runner_of(tiny())
    stepped(runner, prompt(CONTEXT - 1), 2)
    with pytest.raises(CacheOverflow) as caught:
        runner.step([row([5], CONTEXT)])
    assert (caught.value.tokens, caught.value.capacity) == (CONTEXT + 1, CONTEXT)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3_5_text"])
def test_nothing_grows_while_stepping(tiny, family):
    runner = runner_of(tiny(family))
    runner.rehearse()

    def tensor_bytes():
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)

    before, kv_bytes = tensor_bytes(), runner.kv_bytes
    stepped(runner, prompt(50), 40)
    assert (tensor_bytes(), runner.kv_bytes) == (before, kv_bytes)


@pytest.mark.parametrize(("window", "chunk"), [(2, 8), (7, 8), (8, 8), (9, 8), (13, 5), (31, 16), (95, 8)])
def test_masks_and_keys_of_a_window_are_those_of_the_dynamic_cache(tiny, window, chunk):
    config = type(tiny("mistral").config)(**{**tiny("mistral").config.to_dict(), "sliding_window": window})
    mine, theirs = FixedCache(config, CONTEXT, chunk), DynamicCache(config=config)
    states = torch.arange(2.0 * CONTEXT).view(1, 1, -1, 2)
    at = 0
    for n in [chunk, chunk, chunk - 1, *[1] * (CONTEXT - 3 * chunk + 1)]:
        new = states[:, :, at : at + n]
        assert mine.get_mask_sizes(n, 0) == theirs.get_mask_sizes(n, 0)
        for got, want in zip(mine.update(new, -new, 0), theirs.update(new, -new, 0), strict=True):
            assert torch.equal(got, want)
        at += n
        assert mine.get_seq_length() == theirs.get_seq_length() == at


def test_after_a_failed_step_the_sequence_has_to_begin_again_and_can(tiny):
    runner = runner_of(tiny())
    ids = prompt(20)
    before = stepped(runner, ids, 5)
    hook = tiny().model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stepped(runner, ids, 5)
    hook.remove()
    runner.recover()
    with pytest.raises(ValueError, match="the cache holds None"):
        runner.step([row(ids[CHUNK : 2 * CHUNK], CHUNK)])
    assert stepped(runner, ids, 5) == before


def test_a_device_that_cannot_add_is_lost(tiny, monkeypatch):
    runner = runner_of(tiny())
    runner.recover()

    def broken(*_args, **_kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        runner.recover()
