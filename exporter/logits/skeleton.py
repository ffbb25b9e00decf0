"""A model of transformers that holds none of its matrices, with everything in place for a forward.

Matrices are streamed (exporter/logits/streamed.py); norms, biases and the like are read whole, in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from exporter.logits.streamed import Piece, Streamed, pieces
from exporter.logits.variants import MERGED, VARIANTS, Block, Compared, NotComparable
from loader.checkpoint import ModelSpec
from loader.weights import Source, find_sources

if TYPE_CHECKING:
    import torch

# A parameter of more elements than this is never held whole, whatever module it is in.
SMALL_ELEMENTS = 2**20


def build(spec: ModelSpec, compared: Compared) -> Any:
    """The causal language model of a finished export, in fp32 and ready to run.

    Raises NotComparable where transformers has no such model or builds its parameters in ways of its own, and
    TensorMismatch where the shards are not what the architecture has.
    """
    model = _without_memory(spec)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    _put_all(model, find_sources(spec, model, shapes), compared, spec.source)
    return model


def _without_memory(spec: ModelSpec) -> Any:
    """The model in fp32 without memory: parameters on the meta device, computed buffers real."""
    import torch
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    # In eager attention and with experts one by one, a forward touches matrices as `Streamed` knows them.
    plainly = {"attn_implementation": "eager", "experts_implementation": "eager"}
    try:
        config = AutoConfig.for_model(**dict(spec.config))
        with init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **plainly)
    except (ValueError, LookupError, TypeError, AttributeError, ImportError, StrictDataclassError) as err:
        raise NotComparable(spec.source, f"transformers cannot build it ({err})") from err
    model.tie_weights()
    return model.eval()


def _put_all(model: Any, sources: Mapping[str, Source], compared: Compared, where: str) -> None:
    """Put every parameter and buffer of the file in its place: small ones whole, large ones as Streamed.

    A module that has small ones of its own which differ between the variants, or a stack of matrices, runs
    for one variant after the other from now on.
    """
    tied = model.all_tied_weights_keys
    alone: dict[str, list[_Own]] = {}
    for path, module in model.named_modules():
        names = {name: f"{path}.{name}".lstrip(".") for name in (*module._parameters, *module._buffers)}
        found = {name: sources.get(tied.get(full, full)) for name, full in names.items()}
        known = {name: source for name, source in found.items() if source is not None}
        own, is_stack = _fill(module, known, compared, f"{where} ({path})")
        if own or is_stack:
            # A convolution's weight is often taken by the module around it, which never calls it.
            runner = path.rpartition(".")[0] if _is_convolution(module) else path
            alone.setdefault(runner, []).extend(own)
    for path, own in alone.items():
        module = model.get_submodule(path)
        module.forward = partial(_one_by_one, module.forward, own, compared, f"{where} ({path})")


@dataclass(frozen=True, slots=True)
class _Own:
    """A small parameter or buffer of a module that is not the same for all variants."""

    module: Any
    name: str
    values: Mapping[str, torch.Tensor]

    @property
    def differs(self) -> bool:
        import torch

        return not all(torch.equal(self.values[MERGED], other) for other in self.values.values())

    def put(self, variant: str) -> None:
        _put(self.module, self.name, self.values[variant])


def _fill(
    module: Any, sources: Mapping[str, Source], compared: Compared, where: str
) -> tuple[list[_Own], bool]:
    """(small ones that differ, whether a stack of matrices is streamed)"""
    shapes = {name: tuple(getattr(module, name).shape) for name in sources}
    parts = {name: pieces(source, shapes[name], where) for name, source in sources.items()}
    large = [name for name, shape in shapes.items() if _is_streamed(module, name, shape)]
    for name in large:
        _put(module, name, Streamed(compared, where, parts[name], shapes[name]))
    small = {name: _values(compared, parts[name], shapes[name]) for name in sources if name not in large}
    if large == ["weight"] and "bias" in small:
        _move_bias(module, small.pop("bias"))
    own = [_Own(module, name, values) for name, values in small.items()]
    for value in own:
        value.put(MERGED)
    return [value for value in own if value.differs], any(len(shapes[name]) > 2 for name in large)


def _is_streamed(module: Any, name: str, shape: tuple[int, ...]) -> bool:
    import torch
    from transformers.pytorch_utils import Conv1D

    if name == "weight" and isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D):
        return True
    return (len(shape) == 3 and not _is_convolution(module)) or prod(shape) > SMALL_ELEMENTS


def _is_convolution(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.modules.conv._ConvNd)


def _put(module: Any, name: str, value: Any) -> None:
    import torch

    if not isinstance(value, torch.Tensor):
        module._parameters.pop(name)
        module.__dict__[name] = value
    elif name in module._buffers:
        module._buffers[name] = value
    else:
        module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)


def _move_bias(module: Any, bias: Mapping[str, torch.Tensor]) -> None:
    """Let the streamed matrix add it, each variant's own; what the module itself adds then is nothing."""
    module.weight.bias = bias
    _put(module, "bias", bias[MERGED].new_zeros(bias[MERGED].shape))


def _values(compared: Compared, parts: Sequence[Piece], shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """A small parameter in fp32, as every variant has it."""
    import torch

    blocks: list[Block] = []
    for part in parts:
        blocks += compared.open(part.tensor).blocks(0, part.stop - part.start, VARIANTS)
    return {v: torch.cat([block.values(v) for block in blocks]).view(shape) for v in VARIANTS}


# One variant after the other


def _one_by_one(
    forward: Callable[..., Any],
    own: Sequence[_Own],
    compared: Compared,
    where: str,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A module's forward for each variant in the batch, with its own values; results together again."""
    active = compared.active
    arguments = [_shares(arg, compared) for arg in args]
    named = {name: _shares(arg, compared) for name, arg in kwargs.items()}
    results = []
    try:
        for number, variant in enumerate(active):
            compared.active = (variant,)
            for value in own:
                value.put(variant)
            mine = {name: shares[number] for name, shares in named.items()}
            results.append(forward(*(shares[number] for shares in arguments), **mine))
    finally:
        compared.active = active
    return _together(results, where)


def _shares(value: Any, compared: Compared) -> Sequence[Any]:
    """What each variant gets of an argument: its part of a batch, or the argument itself."""
    import torch

    count = len(compared.active)
    if isinstance(value, torch.Tensor) and value.ndim and compared.is_batch(value):
        return value.chunk(count)
    if isinstance(value, tuple) and value:
        return list(zip(*(_shares(item, compared) for item in value), strict=True))
    return [value] * count


def _together(results: Sequence[Any], where: str) -> Any:
    import torch

    if isinstance(results[0], torch.Tensor):
        return torch.cat(list(results))
    if isinstance(results[0], tuple):
        return tuple(_together(items, where) for items in zip(*results, strict=True))
    if results[0] is None:
        return None
    raise NotComparable(where, f"it gives {type(results[0]).__name__}, which cannot be put together again")
