"""Whether an adapter's tensors fit the base's, and what to say of those that do not, all in one error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from exporter.adapters import config as adapter_config
from exporter.adapters.adapter import Adapter
from exporter.adapters.drafts import Draft
from exporter.adapters.names import Layer
from exporter.errors import BadAdapter
from exporter.weights import Stored
from loader import architectures

Shape = tuple[int, ...]

SHOWN = 5
# transformers' Conv1D, a linear layer that keeps its weights as [inputs, outputs], and who is built of it.
_CONV1D_MODELS = frozenset({"clvp", "decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
# Experts whose parameters are [experts, inputs, outputs] (is_transposed in transformers 5).
_INPUTS_FIRST_EXPERTS = frozenset({"aria", "aria_text", "gpt_oss", "openai_privacy_filter"})
_LAYER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")
# int4 kernels want sizes that their groups divide, so repacks add zeros: 29,568 became 29,696 in Qwen2-72B.
_PADDED_TO, _MOST_PADDED = 128, 0.05


def is_whole(shape: Shape, of_base: Shape, may_be_resized: bool) -> bool:
    """Whether a whole tensor can take the place of the base's; a vocabulary may have other rows."""
    is_same_width = len(shape) == len(of_base) == 2 and shape[1:] == of_base[1:]
    return shape == of_base or (may_be_resized and is_same_width)


class Misfits:
    """What of one adapter does not fit, gathered so that it is told at once."""

    def __init__(self, adapter: Adapter, config: Mapping[str, Any]) -> None:
        self._adapter, self._config = adapter, config
        self._homeless: list[Stored] = []
        self._problems: list[str] = []
        self._sizes: list[tuple[Shape, Shape]] = []  # (what it was made for, what the base has)

    def homeless(self, *tensors: Stored) -> None:
        """There is nothing in the base that these could belong to."""
        self._homeless += tensors

    def add(self, problem: str) -> None:
        self._problems.append(problem)

    def incomplete(self, layer: Layer) -> None:
        has = ", ".join(part.value for part in layer.parts)
        self.add(f"{layer.path} has {has} and lacks what belongs to it")

    def whole(self, stored: Stored, name: str, shape: Shape) -> None:
        self._mismatch(f"{stored.name} is {list(stored.shape)}, and {name}", stored.shape, shape)

    # Each says whether it fits, and notes why not

    def orientation(self, path: str, draft: Draft, a: Stored, b: Stored) -> bool | None:
        """Whether the base's matrix is [inputs, outputs]; None where A and B do not fit it."""
        if not self._has_rank(path, a, b):
            return None
        made, shape = (b.shape[0], a.shape[1]), draft.base.shape
        is_inputs_first = self._is_conv1d(path, made == shape[::-1])
        if made == (shape[::-1] if is_inputs_first else shape):
            return is_inputs_first
        if made in (shape, shape[::-1]):
            self.add(
                f"{path}: it is for a matrix of {list(made)} [outputs, inputs], and {draft.name}, "
                f"{list(shape)}, has {'inputs' if is_inputs_first else 'outputs'} first: inputs and outputs "
                "are the other way round (fan_in_fan_out)"
            )
        else:
            self._has_shape(path, draft, made, shape)
        return None

    def is_matrix(self, path: str, draft: Draft, a: Stored, b: Stored) -> bool:
        """As `orientation`, for a matrix that certainly is [outputs, inputs]."""
        made, shape = (b.shape[0], a.shape[-1]), draft.base.shape
        return self._has_rank(path, a, b) and self._has_shape(path, draft, made, shape)

    def is_embedding(self, path: str, draft: Draft, a: Stored, b: Stored) -> bool:
        made, shape = (a.shape[-1], b.shape[0]), draft.base.shape
        return self._has_rank(path, a, b) and self._has_shape(path, draft, made, shape)

    def is_magnitude(self, path: str, draft: Draft, magnitude: Stored, of_columns: bool) -> bool:
        outputs = draft.base.shape[1 if of_columns else 0]
        if magnitude.n_elements != outputs:
            self.add(
                f"{magnitude.name} has {magnitude.n_elements:,} numbers for {outputs:,} outputs of {path}"
            )
        return magnitude.n_elements == outputs

    def is_tokens(self, path: str, draft: Draft, stored: Stored, rows: Sequence[int] | None) -> bool:
        shape = draft.base.shape
        if rows is None:
            self.add(f"{stored.name}: trainable_token_indices does not say which rows of {path} these are")
        elif stored.shape != (len(rows), *shape[1:]):
            wanted = [len(rows), *shape[1:]]
            self.add(f"{stored.name} is {list(stored.shape)}, and trainable_token_indices asks for {wanted}")
        elif outside := [row for row in rows if not 0 <= row < shape[0]]:
            self.add(f"trainable_token_indices names row {outside[0]:,}, and {draft.name} has {shape[0]:,}")
        else:
            return True
        return False

    def stacked(self, path: str, shape: Shape, a: Stored, b: Stored) -> bool | None:
        """Whether the stacked parameter is [experts, inputs, outputs]; None where A and B do not fit it."""
        if len(shape) != 3:
            self.add(f"{path} is {list(shape)}: only parameters of two and three dimensions have adapters")
            return None
        if not self._has_rank(path, a, b, experts=shape[0]):
            return None
        made = (b.shape[0], a.shape[1])
        if made in (shape[1:], shape[:0:-1]):
            is_square = shape[1] == shape[2]
            known = self._config.get("model_type") in _INPUTS_FIRST_EXPERTS
            return known if is_square else made != shape[1:]
        self._mismatch(f"{path}: it is for {list(made)} per expert, and the base", made, shape[1:])
        return None

    def _has_rank(self, path: str, a: Stored, b: Stored, experts: int = 1) -> bool:
        rank = adapter_config.rank(self._adapter.config, path)
        if len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank * experts:
            return True
        if len(a.shape) > 2:
            self.add(f"{path} is a convolution (lora_A is {list(a.shape)}), which is not merged")
            return False
        of = f" for each of {experts} experts" if experts > 1 else ""
        shapes = f"A is {list(a.shape)} and B {list(b.shape)}"
        self.add(f"{path}: {shapes}, and adapter_config.json says rank {rank}{of} (r, rank_pattern)")
        return False

    def _has_shape(self, path: str, draft: Draft, made: Shape, shape: Shape) -> bool:
        if made != shape:
            self._mismatch(f"{path}: it is for {list(made)}, and {draft.name}", made, shape)
        return made == shape

    def _is_conv1d(self, path: str, fits_transposed: bool) -> bool:
        model_type = str(self._config.get("model_type", ""))
        if model_type in _CONV1D_MODELS:
            return path.rpartition(".")[2] in _CONV1D_LAYERS
        if architectures.knows(model_type):
            return False  # whatever the adapter says: peft goes by the class of the layer, too
        return bool(self._adapter.config.get("fan_in_fan_out")) and fits_transposed

    def _mismatch(self, begin: str, made: Shape, shape: Shape) -> None:
        self._sizes.append((made, shape))
        self.add(f"{begin} is {list(shape)}")

    # The error

    def refuse(self) -> None:
        """Raise BadAdapter where anything did not fit: names and shapes of some, the number of all."""
        parts = []
        if self._homeless:
            some = [f"{stored.name} {list(stored.shape)}" for stored in self._homeless]
            count = f"{len(some)} of its {len(self._adapter.tensors)} tensors"
            parts.append(f"{count} have no place in the base: {_some(some)}")
        if self._problems:
            parts.append(f"{len(self._problems)} parts do not fit: {_some(self._problems)}")
        if parts:
            raise BadAdapter(self._adapter.source, f"{'; '.join(parts)}. {self._advice()}")

    def _advice(self) -> str:
        named = f", {self._adapter.trained_on} by its own account" if self._adapter.trained_on else ""
        if self._sizes and all(_is_padded(*sizes) for sizes in self._sizes):
            return (
                "One of the two models is a quantized repack that fills this size up with zeros (to "
                f"a multiple of {_PADDED_TO}). Give the very model that the adapter was trained on as "
                f"--base{named}: quantized bases are exported too."
            )
        task = self._adapter.config.get("task_type")
        if self._homeless and task not in (None, "CAUSAL_LM"):
            return f"It was trained for {task}, with a head of its own that a language model does not have."
        return f"Give the model that it was trained on as --base{named}.{self._layers_beyond()}"

    def _layers_beyond(self) -> str:
        count = self._config.get("num_hidden_layers")
        numbers = [int(found[1]) for stored in self._homeless if (found := _LAYER.search(stored.name))]
        if not isinstance(count, int) or not numbers or max(numbers) < count:
            return ""
        return f" It has layers up to number {max(numbers)}, and this base has {count}, from number 0."


def _some(texts: Sequence[str]) -> str:
    more = f" (and {len(texts) - SHOWN} more)" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more


def _is_padded(made: Shape, shape: Shape) -> bool:
    """Whether the two sizes differ by what a repack adds."""
    pairs = [(min(pair), max(pair)) for pair in zip(made, shape, strict=False) if pair[0] != pair[1]]
    return bool(pairs) and all(
        large % _PADDED_TO == 0 and large - small <= _MOST_PADDED * large for small, large in pairs
    )
