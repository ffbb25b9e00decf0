"""Starts the real thing: tokenizer and template, weights, the worst-case forward, the engine. In that order,
so that what is cheap to refuse is refused before gigabytes are read."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from loader import probe
from loader.errors import BadCheckpoint, OutOfMemory, OverBudget
from loader.plan import Plan
from service import logs
from service.backend import Backend, Progress
from service.load_bar import shown
from service.prompt.defaults import GenerationDefaults
from service.prompt.template import ChatTemplate
from service.settings import Settings

log = logging.getLogger(__name__)

# A tokenizer remembers the pieces of the first words that it meets: by itself of 10,000, which is up to 84 MB
# that no plan knows of. With a tenth of that it took no longer for a text of 6,800 tokens (7 to 10 ms).
WORDS_REMEMBERED = 1_000


class NoTokenizer(BadCheckpoint):
    """The checkpoint's tokenizer is missing or cannot be read."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(
            f"{source}: its tokenizer cannot be loaded: {reason} "
            "Download tokenizer.json and tokenizer_config.json into the same folder."
        )


def start_backend(settings: Settings, plan: Plan, progress: Progress) -> Backend:
    """Carry out the plan and start the engine. What was opened is closed again when it fails.

    Raises LoaderError for what cannot be served, LoadCancelled when the service is to stop.
    """
    progress.enter("importing torch")
    from service.engine.devices import out_of_memory

    opened = ExitStack()
    try:
        return _open(settings, plan, progress, opened)
    except BaseException as err:
        opened.close()
        if out_of_memory(err):
            raise OutOfMemory(progress.state.phase, plan.devices[0].peak_bytes, str(err)) from err
        raise


def _open(settings: Settings, plan: Plan, progress: Progress, opened: ExitStack) -> Backend:
    from loader import hub
    from loader.load import load
    from service.engine.engine import StepEngine
    from service.engine.runner import make_runner

    logs.adopt_libraries()
    _prepare_cpu(settings)
    if plan.spec.path is None:
        progress.enter("downloading the model")
        plan = replace(plan, spec=hub.fetched(plan.spec))
    progress.enter("reading the tokenizer")
    tokenizer = _tokenizer(plan)
    template = ChatTemplate(tokenizer, plan.spec.source, settings.chat_template)
    progress.enter("reading weights")
    with shown(progress) as report:
        loaded = load(plan, report)
    opened.callback(loaded.close)
    progress.enter("rehearsing the largest request")
    runner = make_runner(
        loaded.model, loaded.device, plan, settings.prefix_reuse == "on", settings.gpu_kernels == "auto"
    )
    with ExitStack() as until_the_engine_has_it:
        until_the_engine_has_it.callback(runner.close)
        runner.rehearse()
        loaded.recount()
        check_against_plan(plan, loaded.measured_peak_bytes())
        progress.enter("starting the engine")
        engine = StepEngine(runner, tokenizer, settings.max_queue, settings.max_wait_seconds or None)
        until_the_engine_has_it.pop_all()
    opened.callback(engine.close)
    return Backend(
        engine=engine,
        template=template,
        context=plan.context,
        defaults=GenerationDefaults.read(plan.spec.generation_config, _end_ids(tokenizer, template)),
        created=int(time.time()),
        dtype=plan.dtype,
        memory=loaded,
        opened=opened,
    )


def _prepare_cpu(settings: Settings) -> None:
    """Before anything is computed: how many threads do it, and with which instructions.

    torch would take every core of the machine, also where a container is given the time of two.
    """
    import torch

    from service.engine.cpu import library

    if settings.threads is not None or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(settings.threads or probe.cpu_threads())
    library.restrict(settings.cpu_isa)


def check_against_plan(plan: Plan, measured: Mapping[str, int]) -> None:
    """Log planned against measured for each device. Raises OverBudget when the plan of one that computes was
    wrong; RAM beside a GPU holds CUDA's own libraries too, so there it is only told."""
    for device in plan.devices:
        if device.device not in measured:
            continue
        peak = measured[device.device]
        share = 100 * peak / device.peak_bytes if device.peak_bytes else 0
        log.info(
            "%s: planned peak %s bytes, measured %s (%.0f %%), budget %s",
            device.device, f"{device.peak_bytes:,}", f"{peak:,}", share, f"{device.budget_bytes:,}",
        )  # fmt: skip
        if peak > device.budget_bytes and device.device in plan.budget.compute:
            hint = "Give a larger budget or a shorter --context, and report this: the plan should have known."
            raise OverBudget(device.device, peak, device.budget_bytes, hint)


def _tokenizer(plan: Plan) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(plan.spec.path), trust_remote_code=False)
    except (OSError, ValueError, ImportError) as err:
        raise NoTokenizer(plan.spec.source, str(err).strip().splitlines()[0]) from err
    pieces: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if hasattr(pieces, "_resize_cache"):  # BPE and Unigram; `tokenizers` has no other name for it
        pieces._resize_cache(WORDS_REMEMBERED)
    return tokenizer


def _end_ids(tokenizer: Any, template: ChatTemplate) -> set[int]:
    """The tokenizer's end of text and what the template writes after an answer."""
    own = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    return own | template.end_ids()
