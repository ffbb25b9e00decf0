"""`model.generate` is the oracle: whatever the cache does, greedy tokens in float32 must be the same."""

import gc

import pytest
import torch
from transformers import DynamicCache

from loader.arena import ALIGN_BYTES
from loader.checkpoint import ModelSpec
from loader.footprint import measure
from service.engine.cache import CacheOverflow
from service.engine.runner import Runner
from service.engine.types import DeviceLost

FAMILIES = ("qwen2", "llama", "mistral", "gemma2", "gemma3_text", "qwen3_moe", "lfm2", "qwen3_5_text")
CONTEXT, CHUNK = 96, 8


def prompt(length, seed=1):
    return torch.randint(2, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generated(model, ids, tokens):
    with torch.inference_mode():
        out = model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return out[0, len(ids) :].tolist()


def stepped(runner, slot, ids, tokens):
    token = int(runner.prefill(slot, ids).argmax())
    yield token
    for _ in range(tokens - 1):
        token = int(runner.decode(slot, token).argmax())
        yield token


def runner_of(model, concurrency=2, context=CONTEXT, chunk=CHUNK):
    return Runner(model, "cpu", context, concurrency, chunk)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate_whatever_the_prompt_length(tiny, family):
    runner = runner_of(tiny(family))
    for length in (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 37, 50):
        ids = prompt(length)
        assert list(stepped(runner, 0, ids, 40)) == generated(tiny(family), ids, 40), length
        runner.release(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_that_take_turns_do_not_touch_each_other(tiny, family):
    runner = runner_of(tiny(family), concurrency=3)
    prompts = [prompt(length, seed=length) for length in (3, 20, 41)]
    runs = [stepped(runner, slot, ids, 20) for slot, ids in enumerate(prompts)]
    taken = list(zip(*runs, strict=True))
    assert [list(tokens) for tokens in zip(*taken, strict=True)] == [
        generated(tiny(family), ids, 20) for ids in prompts
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reused_slot_remembers_nothing(tiny, family):
    runner = runner_of(tiny(family))
    fresh = list(stepped(runner, 0, prompt(20), 10))
    list(stepped(runner, 1, prompt(60, seed=2), 30))
    runner.release(1)
    assert list(stepped(runner, 1, prompt(20), 10)) == fresh


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rehearsal_leaves_the_caches_empty_and_changes_no_answer(tiny, family):
    runner = runner_of(tiny(family))
    runner.rehearse()
    assert runner.length(0) == 0
    ids = prompt(30)
    assert list(stepped(runner, 0, ids, 20)) == generated(tiny(family), ids, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_caches_have_exactly_the_bytes_that_were_planned(tiny, family):
    spec = ModelSpec(family, None, tiny(family).config.to_dict(), ())
    planned = measure(spec, "float32").kv_bytes(CONTEXT, CHUNK)
    for concurrency in (1, 3):
        assert runner_of(tiny(family), concurrency).kv_bytes == planned * concurrency


def test_a_full_context_can_be_used_to_the_last_token(tiny):
    runner = runner_of(tiny())
    runner.prefill(0, prompt(CONTEXT - 1))
    runner.decode(0, 5)
    with pytest.raises(CacheOverflow) as caught:
        runner.decode(0, 5)
    assert (caught.value.tokens, caught.value.capacity) == (CONTEXT + 1, CONTEXT)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "qwen3_5_text"])
def test_nothing_grows_while_stepping(tiny, family):
    runner = runner_of(tiny(family))
    runner.rehearse()

    def tensor_bytes():
        gc.collect()
        return sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor)

    before, kv_bytes = tensor_bytes(), runner.kv_bytes
    list(stepped(runner, 0, prompt(50), 40))
    assert (tensor_bytes(), runner.kv_bytes) == (before, kv_bytes)


@pytest.mark.parametrize(("window", "chunk"), [(2, 8), (7, 8), (8, 8), (9, 8), (13, 5), (31, 16), (95, 8)])
def test_masks_and_keys_of_a_window_are_those_of_the_dynamic_cache(tiny, window, chunk):
    from service.engine.cache import FixedCache

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


def test_a_failed_step_is_over_when_its_slot_is_released(tiny):
    runner = runner_of(tiny())
    ids = prompt(20)
    before = list(stepped(runner, 0, ids, 5))
    runner.release(0)
    layer = tiny().model.layers[2].mlp
    hook = layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        runner.prefill(0, ids)
    hook.remove()
    runner.release(0)
    assert list(stepped(runner, 0, ids, 5)) == before


def test_a_device_that_cannot_add_is_lost(tiny, monkeypatch):
    runner = runner_of(tiny())
    runner.check_device()

    def broken(*_args, **_kwargs):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "ones", broken)
    with pytest.raises(DeviceLost, match="illegal memory access"):
        runner.check_device()


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_all_keys_and_values_are_parts_of_one_buffer(tiny, family):
    runner = runner_of(tiny(family), concurrency=3)
    stores = [store for cache in runner._caches for layer in cache.layers for store in layer._stores]
    (buffer,) = {store.untyped_storage().data_ptr() for store in stores}
    assert buffer <= min(store.data_ptr() for store in stores)
    assert stores[0].untyped_storage().nbytes() < runner.kv_bytes + len(stores) * ALIGN_BYTES


def test_cudnns_attention_which_plans_every_length_anew_is_off(tiny):
    torch.backends.cuda.enable_cudnn_sdp(True)
    runner_of(tiny())
    assert not torch.backends.cuda.cudnn_sdp_enabled()
