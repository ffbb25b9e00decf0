"""From the engine's thread to the event loops on which clients wait: token ids, a step's worth at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass

from service.engine.types import EngineError, Logprobs


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token of one request, as the engine's thread knows it: no text yet."""

    token_id: int
    finish_reason: str | None = None  # "stop": it is one of stop_token_ids; "length": no further one may come
    logprobs: Logprobs | None = None
    cached_tokens: int = 0  # of the prompt
    queued_s: float = 0.0  # before the first step


class Channel:
    """One request's tokens, in order. Made, filled and emptied on the loop that receives them."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._items: deque[Chosen | EngineError] = deque()
        self._waiter: asyncio.Future[None] | None = None  # of the one receiver; half an Event

    def put(self, item: Chosen | EngineError) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def receive(self) -> list[Chosen]:
        """All that is there, at least one; waits for the first. Raises the error that was put in a token's
        place, once all before it has been received."""
        if not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        tokens: list[Chosen] = []
        while self._items:
            item = self._items[0]
            if isinstance(item, EngineError):
                if tokens:
                    break
                raise item
            tokens.append(item)
            self._items.popleft()
        return tokens


class Outbox:
    """Collects what a step gives its requests, and delivers it with one call to each loop.

    Waking a loop is a system call, and lets the loop's thread take the interpreter: once a step, not once a
    token. Belongs to the engine's thread.
    """

    def __init__(self) -> None:
        self._mail: dict[asyncio.AbstractEventLoop, list[tuple[Channel, Chosen | EngineError]]] = {}

    def put(self, channel: Channel, item: Chosen | EngineError) -> None:
        self._mail.setdefault(channel.loop, []).append((channel, item))

    def deliver(self) -> list[asyncio.AbstractEventLoop]:
        """Send all that was put; the loops that are closed, where nobody can receive it any more."""
        mail, self._mail = self._mail, {}
        return [loop for loop, items in mail.items() if not _hand_over(loop, items)]


def _hand_over(loop: asyncio.AbstractEventLoop, items: Items[tuple[Channel, Chosen | EngineError]]) -> bool:
    try:
        loop.call_soon_threadsafe(_fill, items)
    except RuntimeError:
        return False
    return True


def _fill(items: Items[tuple[Channel, Chosen | EngineError]]) -> None:
    for channel, item in items:
        channel.put(item)
