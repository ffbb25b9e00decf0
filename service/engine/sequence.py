"""One request on its way through the engine. No torch."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from service.engine.channel import Channel
from service.engine.types import Request


@dataclass(eq=False)
class Sequence:
    """Belongs to the engine's thread from the moment it is in the inbox. Times are time.monotonic()."""

    request: Request
    channel: Channel
    sampling: Any  # service.engine.sampler.SamplingState: survives preemption, so that a seed means one text
    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # first
    last_token: float | None = None
    tokens: list[int] = field(default_factory=list)  # prompt, then what was generated
    computed: int = 0  # of `tokens`, whose keys and values are in the pool
    cached: int = 0  # of the prompt, found in the pool when it was first admitted
    running: bool = False  # holds blocks
    preemptions: int = 0
    finished: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def queued_s(self) -> float:
        """How long it waited for its first step; 0 as long as it does."""
        return 0.0 if self.admitted is None else self.admitted - self.arrived

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be chosen: 1 for who decodes, more for who reads."""
        return len(self.tokens) - self.computed
