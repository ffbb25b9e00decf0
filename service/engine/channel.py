"""From the engine's thread to the event loop on which a client waits."""

from __future__ import annotations

import asyncio

from service.engine.types import EngineError, TokenEvent


class Channel:
    """One request's events, in order. Made on the loop that receives them."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[TokenEvent | EngineError] = asyncio.Queue()

    def send(self, item: TokenEvent | EngineError) -> bool:
        """From any thread. False when nobody can receive it any more, because the loop is closed."""
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)
        except RuntimeError:
            return False
        return True

    async def receive(self) -> TokenEvent:
        """The next event; raises the error that was sent in its place."""
        item = await self._queue.get()
        if isinstance(item, EngineError):
            raise item
        return item
