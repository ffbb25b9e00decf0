"""The life of one service: loading, ready, draining, stopped. Everything the HTTP layer may ask about it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loader.plan import Plan
from service.backend import Backend, LoadCancelled, Progress
from service.engine.types import EngineDead

log = logging.getLogger(__name__)

Start = Callable[[Progress], Backend]


class NotServing(Exception):
    """No request can be answered now: try again in `retry_after_s`, perhaps at another replica."""

    code = "not_serving"
    retry_after_s = 5.0


class Loading(NotServing):
    code = "model_loading"

    def __init__(self, progress: dict[str, Any]) -> None:
        done, total = progress["done_bytes"], progress["total_bytes"]
        how_far = f", {done:,} of {total:,} bytes" if total else ""
        super().__init__(f"the model is being loaded ({progress['phase']}{how_far}); GET /ready tells when")


class Draining(NotServing):
    code = "draining"
    retry_after_s = 10.0

    def __init__(self) -> None:
        super().__init__("the service is stopping: it finishes what runs and takes nothing new")


class LoadFailed(NotServing):
    code = "load_failed"
    retry_after_s = 30.0

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"the model could not be loaded: {error}")


class Service:
    """Owns the backend. Its methods belong to the event loop's thread; attributes may be read from any."""

    def __init__(self, name: str, start: Start, plan: Plan | None = None) -> None:
        self.name = name  # by which clients ask for the model
        self.plan = plan
        self.progress = Progress()
        self.loaded: Backend | None = None
        self.error: BaseException | None = None  # why loading failed
        self.draining = False
        self.active = 0  # requests being answered
        # By HTTP status. Those that alerts ask for are there from the start: rate() sees no first increase.
        self.responses: Counter[int] = Counter({200: 0, 500: 0, 503: 0})
        self._start = start
        self._thread: threading.Thread | None = None
        self._load_ended = asyncio.Event()

    @property
    def engine_alive(self) -> bool:
        loaded = self.loaded
        return loaded is not None and loaded.engine.stats().alive

    @property
    def ready(self) -> bool:
        return self.engine_alive and not self.draining

    def backend(self) -> Backend:
        """What answers requests. Raises NotServing or EngineDead, with the reason."""
        if self.draining:
            raise Draining
        if self.error:
            raise LoadFailed(self.error)
        if self.loaded is None:
            raise Loading(self.progress.state.as_dict())
        if not self.loaded.engine.stats().alive:
            raise EngineDead("the engine has ended: the service must be started again")
        return self.loaded

    def load_in_background(self) -> None:
        """Start loading on a thread of its own; `/health` and `/ready` answer meanwhile."""
        loop = asyncio.get_running_loop()
        # A daemon: a load that does not come to a cancellation point must not keep a stopped process alive.
        self._thread = threading.Thread(target=self._load, args=(loop,), name="load", daemon=True)
        self._thread.start()

    async def wait_until_loaded(self) -> None:
        """Return when loading has ended: `loaded` or `error` is set, or it was cancelled."""
        await self._load_ended.wait()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Count one request for as long as its response is being sent."""
        self.active += 1
        try:
            yield
        finally:
            self.active -= 1

    def drain(self) -> None:
        """Take nothing new from now on; what runs goes on. A load is cancelled. Idempotent."""
        self.draining = True
        self.progress.cancel()

    async def close(self, limit_s: float = 10) -> None:
        """Stop the engine and give the model's memory back; what still runs ends with EngineDead."""
        self.drain()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, limit_s)
        backend, self.loaded = self.loaded, None
        if backend is not None:
            await asyncio.to_thread(backend.close)

    def _load(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            loaded = self._start(self.progress)
            self.progress.leave()
            self.loaded = loaded
            took = self.progress.took
            words = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in took.items())
            log.info(
                "ready: %s, after %.1f s (%s)", self.name, sum(took.values()), words,
                extra={"fields": {"start_seconds": {phase: round(took[phase], 3) for phase in took}}},
            )  # fmt: skip
        except LoadCancelled:
            log.info("loading was cancelled")
        except BaseException as err:
            self.error = err
            log.error("loading failed: %s", type(err).__name__)  # whoever runs the service tells the rest
        _tell(loop, self._load_ended.set)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    """Call in the loop's thread; a loop that has ended meanwhile needs to know nothing."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        log.debug("the event loop had ended before loading did")
