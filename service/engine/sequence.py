"""One request on its way through the engine."""

from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Any, Protocol

from service.engine.answer import Answer
from service.engine.channel import Channel
from service.engine.types import Request


class TokenChooser(Protocol):
    """From logits to a token id; `service.engine.sampler.Sampler` is the real one."""

    def choose(self, logits: Any) -> int: ...


@dataclass(eq=False)
class Sequence:
    """Belongs to the engine's thread from the moment it is in the inbox. Times are time.monotonic()."""

    request: Request
    sampler: TokenChooser
    answer: Answer
    channel: Channel
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    last_token: float | None = None
    slot: int | None = None  # of the KV cache, while it runs
    finished: bool = False
    _unread: int = 0  # prompt ids from here on have not been read
    _last_id: int = -1

    @property
    def reading(self) -> bool:
        """True until the whole prompt has been through the model."""
        return self._unread < len(self.request.prompt_ids)

    def next_ids(self, chunk_tokens: int) -> Ids[int]:
        """What the next step puts into the model: a chunk of the prompt, then one token at a time."""
        if self.reading:
            return self.request.prompt_ids[self._unread : self._unread + chunk_tokens]
        return (self._last_id,)

    def count_read(self, tokens: int) -> None:
        self._unread += tokens

    def count_generated(self, token_id: int) -> None:
        self._last_id = token_id
