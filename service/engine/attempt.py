"""One step, tried: what was chosen, or what went wrong."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from service.engine.devices import out_of_memory
from service.engine.rows import StepRunner
from service.engine.sampler import BadLogits, Choice, Sampler
from service.engine.scheduler import Step

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Failure:
    """Of a step. Not the exception: its traceback holds the step's tensors, and the clients hold this."""

    message: str
    out_of_memory: bool


def attempt(
    runner: StepRunner, sampler: Sampler, step: Step, meanwhile: Callable[[], None]
) -> list[Choice | BadLogits] | Failure:
    """One forward, and a choice for each row that asks for one, in their order. `meanwhile` is as
    StepRunner.step says."""
    try:
        return _choices(runner, sampler, step, meanwhile)
    except Exception as error:
        failure = Failure(f"{type(error).__name__}: {error}", out_of_memory(error))
        if not failure.out_of_memory:
            log.exception("a step of %d requests failed", len(step.rows))
        # Who keeps the exception, as some log handlers do, must not keep the step's tensors with it.
        traceback.clear_frames(error.__traceback__)
        return failure


def _choices(
    runner: StepRunner, sampler: Sampler, step: Step, meanwhile: Callable[[], None]
) -> list[Choice | BadLogits]:
    """Holds tensors, and so has a frame of its own."""
    logits = runner.step([scheduled.row for scheduled in step.rows], meanwhile)
    states = [scheduled.sequence.sampling for scheduled in step.rows if scheduled.row.sample]
    return sampler.choose(logits, states) if states else []
