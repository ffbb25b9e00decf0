"""Rows of many sequences in one forward. Only this file and single.py call the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from collections.abc import Sequence as Ids
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from loader.batching import CONTINUOUS
from loader.errors import UnsupportedModel
from loader.kv_layout import KvLayout
from service.engine import pool
from service.engine.attention import Attached, Backend, CurrentStep, UnsupportedAttention, connected
from service.engine.backends import backend_for
from service.engine.batch import Batcher, Step
from service.engine.cpu import library
from service.engine.cpu.packing import pack
from service.engine.cuda.fusing import Fused, fuse
from service.engine.devices import check_device, numbered
from service.engine.graphs import CudaRecorder, DecodeGraphs, Recorder
from service.engine.pool import LayerShape, LayerStore
from service.engine.proof import prove
from service.engine.rehearsal import rehearse_choice, worst_steps
from service.engine.repeats import Repeats
from service.engine.rows import Row, nothing
from service.engine.single import SingleRunner

if TYPE_CHECKING:
    from loader.plan import Plan

log = logging.getLogger(__name__)


def make_runner(
    model: Any, device: Any, plan: Plan, prefix_reuse: bool = True, gpu_kernels: bool = True
) -> Runner | SingleRunner:
    """The runner that the plan asks for: of many sequences at once, or of one whose cache is of another kind.

    `device` is where the model's inputs go. `gpu_kernels`: whether ours compute there. Raises
    UnsupportedModel when the model asks for another attention than ours, which the plan should have known.
    """
    # On an H100 torch prefers cuDNN's attention, which builds a plan for every length that it has not met
    # (60 ms for each new token) and keeps them all.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if plan.batching != CONTINUOUS:
        return SingleRunner(model, device, plan.context, plan.chunk_tokens, plan.kv)
    try:
        runner = Runner(
            model, device, plan.context, plan.concurrency, plan.chunk_tokens, plan.kv, prefix_reuse
        )
    except UnsupportedAttention as refusal:
        spec, reason = plan.spec, f"{refusal}, which the plan did not know. Report this."
        raise UnsupportedModel(spec.source, spec.model_type, reason) from refusal
    if torch.device(device).type == "cpu":
        _pack(model, runner)
    elif gpu_kernels:
        runner.fused = fuse(model, runner, numbered(torch.device(device)))
    return runner


def _pack(model: Any, runner: Runner) -> None:
    """Let the CPU kernels have what they can compute. Raises KernelsDiffer when they compute otherwise."""
    found = library.kernels()
    if found is not None:
        prove(runner, partial(pack, model, found), "--cpu-isa off")
    log.info("%s", library.describe())


class Runner:
    """Sequences are packed one after the other into a batch of one; attention tells them apart.

    All keys and values are allocated here. Between steps no tensor is kept but these and the step's buffers,
    so memory does not grow. Not thread-safe: whoever steps is the only one who calls.
    """

    one_state = False

    def __init__(
        self,
        model: Any,
        device: Any,
        context: int,
        concurrency: int,
        chunk_tokens: int,
        layout: KvLayout,
        prefix_reuse: bool = True,
        recorder: Recorder | None = None,
    ) -> None:
        """`device` is where inputs go; layers may be anywhere, and their blocks are where they compute.

        Runs one token through the model: the keys that come out tell shape, dtype and device of each layer,
        whatever the family. `recorder` takes the place of CUDA's graphs, for tests.
        """
        self.context, self.concurrency, self.layout = context, concurrency, layout
        self.prefix_reuse = prefix_reuse
        self.chunk_tokens = min(chunk_tokens, context)
        self._model, self._device = model, numbered(torch.device(device))
        self.vocab: int = model.get_input_embeddings().num_embeddings
        self._batcher = Batcher(layout, context, concurrency, self.chunk_tokens, self._device)
        self._current = CurrentStep()
        self._attached = Attached(model)
        self._graphs: DecodeGraphs | None = None
        self.fused: Fused | None = None  # closed with the runner
        try:
            self._shapes = self._attached.discover(layout, self._first_forward)
            self._stores = self._connect()
        except BaseException:
            self._attached.close()
            raise
        # On a CPU two large chunks take as long as a hundred answers. What is offloaded has to be read.
        on_a_cpu = self._device.type == "cpu" and not self._hooked()
        self._repeats = Repeats(model, layout) if on_a_cpu else None
        if recorder is not None or self._recordable():
            self._graphs = DecodeGraphs(
                self._batcher, self._forward, concurrency, recorder or CudaRecorder(self._device)
            )

    @property
    def kv_bytes(self) -> int:
        """Bytes of all blocks, those that only fill a batch up included."""
        return sum(store.keys.nbytes + store.values.nbytes for store in self._stores.values())

    @torch.inference_mode()
    def step(self, rows: Ids[Row], meanwhile: Callable[[], None] = nothing) -> torch.Tensor:
        """As StepRunner says. The logits are good until the next step."""
        if self._graphs is not None:
            logits = self._graphs.step(rows)
            if logits is not None:
                meanwhile()  # the graph has only been launched
                return logits
        self._current.meanwhile = meanwhile
        return self._forward(self._batcher.build(rows))

    def recover(self) -> None:
        """After an error. What the step held went with its exception; a device that cannot even add, as a GPU
        whose context is broken, is lost: then no later step can succeed either."""
        self._current.step = self._current.meanwhile = None
        for device in dict.fromkeys([self._device, *(shape.device for shape in self._shapes.values())]):
            check_device(device)

    @torch.inference_mode()
    def rehearse(self) -> None:
        """The worst steps there can be, so that the memory measured afterwards is the real peak.

        Records the graphs first: what they hold is beside what any step needs. Blocks keep what is written
        here; nobody looks for it. On a CPU only one layer of each kind computes, and no whole chunk of one
        sequence, which takes a second: a chunk beside others is of as many tokens, and has more logits.
        """
        if self._graphs is not None:
            single = worst_steps(self.layout, self.context, 1, 1)[0][0]
            if not self._graphs.record(single):
                self._graphs = None
        steps = worst_steps(self.layout, self.context, self.concurrency, self.chunk_tokens)
        with self.shortened():
            for rows in steps[1:] if self._repeats else steps:
                logits = self._forward(self._batcher.build(rows))
        rehearse_choice(logits, self.context)

    def shortened(self) -> AbstractContextManager[None]:
        """Meanwhile, on a CPU, only one layer of each kind computes."""
        return self._repeats.left_out() if self._repeats else nullcontext()

    def close(self) -> None:
        """Let go of the model, which has its own attention again, and free the blocks. Idempotent."""
        if self._model is None:
            return
        if self._graphs is not None:
            self._graphs.close()
        if self.fused is not None:
            self.fused.close()
        self._attached.close()
        self._current.step = None
        self._model, self._repeats, self._stores = None, None, {}

    def _forward(self, step: Step) -> torch.Tensor:
        """Logits [samples, vocab] of the step's `keep`."""
        batch = step.main
        self._current.step = step
        output = self._model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            use_cache=False,
            # Indices: of a prefill nobody wants a row of logits for each token.
            logits_to_keep=batch.keep,
        )
        self._current.step = None
        logits: torch.Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def _first_forward(self) -> None:
        self._model(
            input_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device),
            position_ids=torch.zeros(1, 1, dtype=torch.long, device=self._device),
            use_cache=False,
            logits_to_keep=torch.zeros(1, dtype=torch.long, device=self._device),
        )

    def _connect(self) -> dict[int, LayerStore]:
        size = self.layout.block_tokens

        def shapes(index: int, layer: LayerShape, blocks: int) -> pool.Shapes:
            return self._backend(index).shapes(layer, blocks, size)

        with torch.inference_mode():
            stores = pool.allocate(self.layout, self._shapes, shapes)
        layers = {index: self._backend(index)(store) for index, store in stores.items()}
        self._attached.connect(connected(layers, self._shapes, self._current))
        return stores

    def _backend(self, index: int) -> type[Backend]:
        return backend_for(self._shapes[index], self.layout.block_tokens)

    def _hooked(self) -> bool:
        """Whether weights are copied in when they are needed."""
        return any(hasattr(module, "_hf_hook") for module in self._model.modules())

    def _recordable(self) -> bool:
        """Whether a decode step is kernels on one GPU and nothing else: no weight is copied in."""
        return (
            self._device.type == "cuda"
            and all(self._backend(index).recordable for index in self._shapes)
            and not self._hooked()
            and {x.device for x in self._model.state_dict().values()} == {self._device}
        )
