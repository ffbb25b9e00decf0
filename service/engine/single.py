"""Models whose caches are no blocks (linear attention, convolutions, MLA) run here, one request at a time."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from typing import Any

import torch

from loader.kv_layout import KvLayout
from service.engine.cache import FixedCache, allocated
from service.engine.devices import check_device
from service.engine.rehearsal import rehearse_choice
from service.engine.rows import Row, nothing


class SingleRunner:
    """A model and one cache of `context` tokens, of which nothing grows.

    Block tables mean nothing here; a row that starts at 0 begins a new sequence. After an error the layers'
    lengths may differ, so the sequence has to begin again at 0. Not thread-safe.
    """

    concurrency = 1
    prefix_reuse = False
    one_state = True

    def __init__(self, model: Any, device: Any, context: int, chunk_tokens: int, layout: KvLayout) -> None:
        """`layout` is only what the engine counts by. `device` is where inputs go; layers may be anywhere,
        and their caches are where they compute.

        Runs one token through the model: what comes out tells shape, dtype and device of each layer's cache,
        whatever the family.
        """
        self.context, self.chunk_tokens = context, min(chunk_tokens, context)
        self.layout = layout
        self.vocab: int = model.get_input_embeddings().num_embeddings
        self._model, self._device = model, torch.device(device)
        self._length: int | None = 0  # tokens in the cache; None: nobody knows, after an error
        self._cache = self._allocated()

    @property
    def kv_bytes(self) -> int:
        return self._cache.n_bytes

    @torch.inference_mode()
    def step(self, rows: Ids[Row], meanwhile: Callable[[], None] = nothing) -> torch.Tensor:
        """As StepRunner says, for one row. Raises ValueError where it does not go on as it was left."""
        (row,) = rows
        if row.start == 0:
            self._reset()
        if row.start != self._length:
            raise ValueError(f"a row starts at {row.start} and the cache holds {self._length} tokens")
        meanwhile()
        logits = self._forward(row.ids)
        return logits if row.sample else logits[:0]

    def recover(self) -> None:
        """After an error: raises DeviceLost when no later step can succeed."""
        check_device(self._device)

    @torch.inference_mode()
    def rehearse(self) -> None:
        """The worst steps there can be, so that the memory measured afterwards is the real peak: a full chunk
        at the end of a full context, a token there, and a choice with every feature on."""
        self._fill(self.context - self.chunk_tokens)
        self._forward([0] * self.chunk_tokens)
        self._fill(self.context - 1)
        rehearse_choice(self._forward([0]), self.context)
        self._reset()

    def close(self) -> None:
        """Let go of the model and free the cache. Idempotent."""
        self._model = None
        self._cache.layers.clear()

    def _forward(self, ids: Ids[int]) -> torch.Tensor:
        """Logits [1, vocab] after the last of `ids`."""
        past, self._length = self._length, None
        assert past is not None
        output = self._model(
            input_ids=torch.tensor([list(ids)], device=self._device),
            position_ids=torch.arange(past, past + len(ids), device=self._device).unsqueeze(0),
            past_key_values=self._cache,
            use_cache=True,
            # An index, not 1: from a view of the last row torch multiplies with a copy of the whole head.
            logits_to_keep=torch.tensor([len(ids) - 1], device=self._device),
        )
        self._length = past + len(ids)
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def _allocated(self) -> FixedCache:
        config = self._model.config
        self._cache = sample = FixedCache(config, context=1, chunk_tokens=1)
        self._forward([0])
        self._reset()
        return allocated(sample, config, self.context, self.chunk_tokens, 1)[0]

    def _reset(self) -> None:
        self._cache.reset()
        self._length = 0

    def _fill(self, tokens: int) -> None:
        """Make the cache hold that many tokens, without computing them where that is possible."""
        self._reset()
        if self._cache.seekable:
            self._cache.seek(tokens)
            self._length = tokens
        else:
            for at in range(0, tokens, self.chunk_tokens):
                self._forward([0] * min(self.chunk_tokens, tokens - at))
