"""What answers requests once the model is loaded, and the progress that is reported until then."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import psutil

from service.engine.types import Engine
from service.prompt.defaults import GenerationDefaults
from service.prompt.token_text import TokenText

log = logging.getLogger(__name__)


class Tokens(Protocol):
    """The vocabulary; `service.prompt.token_text.TokenTexts` is the real one."""

    @property
    def count(self) -> int:
        """Token ids are 0 to count - 1."""
        ...

    def of(self, token_id: int) -> TokenText: ...


class Template(Protocol):
    """From chat messages to token ids; `service.prompt.template.ChatTemplate` is the real one."""

    @property
    def tokens(self) -> Tokens:
        """The vocabulary that `encode` takes its ids from."""
        ...

    def encode(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """Called on any thread; a long prompt takes a while. Raises TemplateRefused."""
        ...

    def least_tokens(self, messages: Sequence[Mapping[str, str]]) -> int:
        """Fewer than `encode` gives, without reading the text: what is far too long is refused at once."""
        ...


class ModelMemory(Protocol):
    """What the model holds; `loader.load.LoadedModel` is the real one."""

    @property
    def baseline_bytes(self) -> int:
        """Resident memory of the process before anything was loaded."""
        ...

    def measured_peak_bytes(self) -> Mapping[str, int]:
        """The most that each device but the disk has held for the model so far. Asked at every scrape."""
        ...


@dataclass(frozen=True)
class Backend:
    """A loaded model with everything that the HTTP layer asks of it. `close()` gives all of it back."""

    engine: Engine
    template: Template
    context: int  # tokens of one conversation, prompt and answer together
    defaults: GenerationDefaults
    created: int  # seconds since the epoch
    dtype: str
    memory: ModelMemory | None = None  # None: nothing is measured
    opened: ExitStack = field(default_factory=ExitStack)  # engine, model: what close() closes, in reverse

    def close(self) -> None:
        """Never raises: the process is about to end, and one that fails must not keep the others open."""
        try:
            self.opened.close()
        except Exception:
            log.exception("closing failed")


class LoadCancelled(Exception):
    """The service is to stop, so the loading thread unwinds."""


@dataclass(frozen=True, slots=True)
class LoadState:
    """How far loading is. `total_bytes` is 0 while nothing is known."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "done_bytes": self.done_bytes, "total_bytes": self.total_bytes}


class Progress:
    """Written by the loading thread, read by /ready. Every call is a point where loading can be cancelled."""

    def __init__(self) -> None:
        self.state = LoadState("starting")  # since the process began
        self.took: dict[str, float] = {}  # seconds, of each phase that is over
        self._entered = time.monotonic() - _process_age_s()
        self._cancelled = threading.Event()

    def enter(self, phase: str) -> None:
        """Begin a phase: words for a person. Raises LoadCancelled."""
        self._check()
        self.leave()
        self.state = LoadState(phase)
        log.info("%s", phase)

    def leave(self) -> None:
        """The last phase is over."""
        now = time.monotonic()
        # A new one: a scrape may be reading the old one.
        self.took = {**self.took, self.state.phase: now - self._entered}
        self._entered = now

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """The callback that `loader.load` takes. Raises LoadCancelled."""
        self._check()
        self.state = replace(self.state, done_bytes=done_bytes, total_bytes=total_bytes)

    def cancel(self) -> None:
        self._cancelled.set()

    def _check(self) -> None:
        if self._cancelled.is_set():
            raise LoadCancelled


def _process_age_s() -> float:
    """To a second: Linux tells the time it booted no better."""
    return max(0.0, time.time() - psutil.Process().create_time())
