"""The only file that calls the model: token ids in, logits of the last one out, one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from service.engine.cache import FixedCache, allocated
from service.engine.sampler import Sampler
from service.engine.types import DeviceLost, SamplingParams

# Over equal scores, no short nucleus is enough, so everything is sorted.
_EVERY_FEATURE = SamplingParams(max_tokens=1, top_p=0.999999, repetition_penalty=1.1, seed=0)


class Runner:
    """A model and `concurrency` KV caches of `context` tokens, all of them allocated here.

    Between steps no tensor is kept but the caches, so memory does not grow. Not thread-safe: whoever steps is
    the only one who calls.
    """

    def __init__(self, model: Any, device: Any, context: int, concurrency: int, chunk_tokens: int) -> None:
        """`device` is where inputs go; layers may be anywhere, and their caches are where they compute.

        Runs one token through the model: the keys that come out tell shape, dtype and device of each layer,
        whatever the family.
        """
        self.context, self.concurrency = context, concurrency
        self.chunk_tokens = min(chunk_tokens, context)
        self._model, self._device = model, torch.device(device)
        # On an H100 torch prefers cuDNN's attention, which builds a plan for every length that it has not met
        # (60 ms for each new token) and keeps them all.
        torch.backends.cuda.enable_cudnn_sdp(False)
        self._caches = self._allocate()

    @property
    def kv_bytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.n_bytes for cache in self._caches)

    def length(self, slot: int) -> int:
        """Tokens in the slot's cache."""
        return self._caches[slot].get_seq_length()

    @torch.inference_mode()
    def prefill(self, slot: int, ids: Sequence[int]) -> torch.Tensor:
        """Read all of `ids` after what the slot holds, in chunks. Logits [vocab] after the last."""
        for start in range(0, len(ids) - self.chunk_tokens, self.chunk_tokens):
            self.step(slot, ids[start : start + self.chunk_tokens])
        rest = (len(ids) - 1) % self.chunk_tokens + 1
        return self.step(slot, ids[-rest:])

    def decode(self, slot: int, token_id: int) -> torch.Tensor:
        """Logits [vocab] after one more token."""
        return self.step(slot, (token_id,))

    @torch.inference_mode()
    def step(self, slot: int, ids: Sequence[int]) -> torch.Tensor:
        """One forward over at most `chunk_tokens` ids. Logits [vocab] after the last, in the model's dtype.

        After an error the layers of this slot's cache differ in length: release it.
        """
        cache = self._caches[slot]
        past = cache.get_seq_length()
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.arange(past, past + len(ids), device=self._device).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            # An index, not 1: from a view of the last row torch multiplies with a copy of the whole head.
            logits_to_keep=torch.tensor([len(ids) - 1], device=self._device),
        )
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    @torch.inference_mode()
    def release(self, slot: int) -> None:
        """Empty the slot's cache; its memory stays."""
        self._caches[slot].reset()

    def check_device(self) -> None:
        """For after an error: raises DeviceLost when the device cannot even add, as a GPU whose context is
        broken; then no later step can succeed either."""
        try:
            float(torch.ones(1, device=self._device) + 1)
        except Exception as error:
            raise DeviceLost(f"{self._device} answers nothing any more: {error}") from error

    def close(self) -> None:
        """Let go of the model and free the caches."""
        self._model = None
        self._caches = []

    @torch.inference_mode()
    def rehearse(self) -> None:
        """The worst steps there can be, so that the memory measured afterwards is the real peak.

        A full chunk at the end of a full context, a token after it, and a choice with every feature on.
        """
        self._fill(self.context - self.chunk_tokens)
        self.step(0, [0] * self.chunk_tokens)
        self.release(0)
        self._fill(self.context - 1)
        logits = self.decode(0, 0)
        prompt_ids = range(min(self.context, len(logits)))
        Sampler(_EVERY_FEATURE, prompt_ids).choose(torch.zeros_like(logits))
        self.release(0)

    def _allocate(self) -> list[FixedCache]:
        config = self._model.config
        sample = FixedCache(config, context=1, chunk_tokens=1)
        self._caches = [sample]
        self.step(0, (0,))
        self.release(0)
        with torch.inference_mode():
            return allocated(sample, config, self.context, self.chunk_tokens, self.concurrency)

    def _fill(self, tokens: int) -> None:
        """Make slot 0 hold that many tokens, without computing them where that is possible."""
        cache = self._caches[0]
        if cache.seekable:
            cache.seek(tokens)
        elif tokens:
            self.prefill(0, [0] * tokens)
