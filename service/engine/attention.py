"""The attention function that models call here: keys and values go to the pool, and queries read it.

One function is registered, once per process. What it needs lies on the attention module that calls it, so
there is no global state and models can live side by side. No mask function is registered with it, and so
transformers makes no mask (masking_utils._preprocess_mask_arguments).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from loader.kv_layout import KvLayout
from service.engine.batch import Batch, Step
from service.engine.pool import LayerShape, LayerStore, Shapes

NAME = "snugfit"
ATTRIBUTE = "_snugfit_attention"  # of an attention module: its Layer
# Arguments by which some models change what attention computes, beside those that are served.
_CHANGES = ("s_aux", "sinks", "head_mask", "position_bias", "attention_bias", "alibi", "bias", "block_mask")


class UnsupportedAttention(Exception):
    """The model asks for an attention that is not served from blocks: run it one request at a time."""


class Backend(Protocol):
    """One layer's way to keep keys and values and to attend to them."""

    recordable: bool  # whether a step of single tokens can be a CUDA graph: nothing depends on host numbers
    store: LayerStore

    def __init__(self, store: LayerStore) -> None: ...

    @staticmethod
    def shapes(layer: LayerShape, blocks: int, block_tokens: int) -> Shapes:
        """Of keys and of values, for that many blocks."""
        ...

    def write(self, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Put [tokens, kv_heads, head_dim] into the batch's slots."""
        ...

    def attend(self, query: torch.Tensor, batch: Batch, scale: float, softcap: float | None) -> torch.Tensor:
        """[tokens, heads, head_dim] from queries of that shape; keys of the batch are written already.

        A token sees those of its sequence up to itself, and of these the window's. With a softcap c a score s
        is c * tanh(s / c).
        """
        ...


class CurrentStep:
    """The step that is being computed: shared by all layers of one runner."""

    step: Step | None = None
    meanwhile: Callable[[], None] | None = None  # called when the first layer begins

    def on(self, device: torch.device) -> Batch:
        assert self.step is not None
        batch = self.step.on(device)
        if self.meanwhile is not None:
            meanwhile, self.meanwhile = self.meanwhile, None
            meanwhile()
        return batch


class Layer:
    """One attention module's connection to its keys and values."""

    def __init__(self, backend: Backend, device: torch.device, current: CurrentStep) -> None:
        self.backend = backend
        self._device, self._current = device, current

    def batch(self) -> Batch:
        """Of the step that is being computed."""
        return self._current.on(self._device)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        **_options: Any,
    ) -> torch.Tensor:
        """[1, tokens, heads, head_dim] from the packed [1, heads, tokens, head_dim] of a step."""
        batch = self.batch()
        self.backend.write(key[0].transpose(0, 1), value[0].transpose(0, 1), batch)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return self.backend.attend(query[0].transpose(0, 1), batch, scale, softcap)[None]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls, in the form of its AttentionInterface."""
    layer = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise UnsupportedAttention(f"{type(module).__name__} has no layer_idx, so its keys have no place")
    return layer(query, key, value, attention_mask=attention_mask, **options), None


def layer_of(module: torch.nn.Module) -> Layer | None:
    """What connects an attention module with its keys and values; None where nothing does."""
    found = getattr(module, ATTRIBUTE, None)
    return found if isinstance(found, Layer) else None


AttentionInterface.register(NAME, attention)


class Attached:
    """A model that calls our attention. `close()` gives it back the one it had."""

    def __init__(self, model: Any) -> None:
        """Raises UnsupportedAttention when the model's class has attention of its own."""
        self._model, self._before = model, model.config._attn_implementation
        self._modules: dict[int, torch.nn.Module] = {}
        model.set_attn_implementation(NAME)
        if model.config.get_text_config()._attn_implementation != NAME:
            self.close()
            raise UnsupportedAttention(f"{type(model).__name__} does not take attention from outside")

    def discover(self, layout: KvLayout, forward: Callable[[], object]) -> dict[int, LayerShape]:
        """What each layer gives its attention in `forward`, a pass over one token.

        Raises UnsupportedAttention unless every layer of the layout calls once, with what can be served.
        """
        found: list[tuple[int, torch.nn.Module, LayerShape]] = []
        with self._probes(found):
            forward()
        called = sorted(index for index, _, _ in found)
        planned = sorted(index for group in layout.groups for index in group.layers)
        if called != planned:
            raise UnsupportedAttention(f"layers {called} attend, and keys of {planned} were planned")
        self._modules = {index: module for index, module, _ in found}
        return {index: shape for index, _, shape in found}

    def connect(self, layers: Mapping[int, Layer]) -> None:
        for index, layer in layers.items():
            setattr(self._modules[index], ATTRIBUTE, layer)

    def close(self) -> None:
        """Idempotent."""
        if self._model is None:
            return
        for module in self._modules.values():
            if hasattr(module, ATTRIBUTE):
                delattr(module, ATTRIBUTE)
        self._modules = {}
        self._model.set_attn_implementation(self._before)
        self._model = None

    @contextmanager
    def _probes(self, found: list[tuple[int, torch.nn.Module, LayerShape]]) -> Iterator[None]:
        modules = [x for x in self._model.modules() if isinstance(getattr(x, "layer_idx", None), int)]
        for module in modules:
            setattr(module, ATTRIBUTE, _probe(module, found))
        try:
            yield
        finally:
            for module in modules:
                delattr(module, ATTRIBUTE)


def _probe(module: Any, found: list[tuple[int, torch.nn.Module, LayerShape]]) -> Callable[..., torch.Tensor]:
    """Stands in for a layer over a single token, which can only see itself."""

    def answer(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        _refuse_what_is_not_served(module, query, key, value, options)
        heads, kv_heads = query.shape[1], key.shape[1]
        shape = LayerShape(key.device, key.dtype, heads, kv_heads, key.shape[3], options.get("softcap"))
        found.append((module.layer_idx, module, shape))
        return value.repeat_interleave(heads // kv_heads, dim=1).transpose(1, 2)

    return answer


def _refuse_what_is_not_served(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: Mapping[str, Any]
) -> None:
    name = type(module).__name__
    asked = [option for option in _CHANGES if options.get(option) is not None]
    if options.get("attention_mask") is not None:
        asked.append("attention_mask")
    if options.get("dropout"):
        asked.append("dropout")
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        asked.append("is_causal=False")
    if asked:
        raise UnsupportedAttention(f"{name} asks for {', '.join(asked)}")
    dtypes = {query.dtype, key.dtype, value.dtype}
    if key.shape != value.shape or query.shape[3] != key.shape[3] or len(dtypes) > 1:
        raise UnsupportedAttention(
            f"{name} has queries {list(query.shape)}, keys {list(key.shape)} and values {list(value.shape)}"
        )


def connected(
    backends: Mapping[int, Backend], shapes: Mapping[int, LayerShape], current: CurrentStep
) -> dict[int, Layer]:
    """A layer for every backend."""
    return {index: Layer(backend, shapes[index].device, current) for index, backend in backends.items()}
