"""What the names of an adapter's tensors mean, in every form that trainers write them.

peft writes "base_model.model.<path>.lora_A.weight". With FSDP, DeepSpeed or older versions the adapter's own
name stays inside ("lora_A.default.weight"), wrappers leave a word of theirs ("_orig_mod"), and adapters saved
without PeftModel lack the prefix.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from exporter.errors import BadAdapter
from exporter.weights import Stored


class Part(Enum):
    """What a tensor is to its layer."""

    A = "lora_A"  # [rank, inputs]
    B = "lora_B"  # [outputs, rank]
    B_BIAS = "lora_B's bias"  # [outputs]
    EMBEDDING_A = "lora_embedding_A"  # [rank, rows of the embedding]
    EMBEDDING_B = "lora_embedding_B"  # [columns of the embedding, rank]
    MAGNITUDE = "lora_magnitude_vector"  # DoRA's
    TOKENS = "trainable_tokens_delta"  # [tokens, columns]
    SAVED = "a whole tensor"


_PREFIX = "base_model.model."
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NAMED = r"(?:\.[^.]+)?"  # the adapter's name, where it was left inside
_FORMS: tuple[tuple[Part, re.Pattern[str]], ...] = tuple(
    (part, re.compile(r"(.+)\." + form))
    for part, form in (
        (Part.A, rf"lora_A{_NAMED}\.weight"),
        (Part.B, rf"lora_B{_NAMED}\.weight"),
        (Part.B_BIAS, rf"lora_B{_NAMED}\.bias"),
        (Part.EMBEDDING_A, rf"lora_embedding_A{_NAMED}"),
        (Part.EMBEDDING_B, rf"lora_embedding_B{_NAMED}"),
        (Part.MAGNITUDE, rf"lora_magnitude_vector{_NAMED}(?:\.weight)?"),
        (Part.TOKENS, rf"token_adapter\.trainable_tokens_delta{_NAMED}"),
    )
)
# Between a module and its parameter, where peft stood around the module.
_AROUND = re.compile(r"\.(?:modules_to_save(?:\.[^.]+)?|token_adapter\.base_layer|base_layer)(?=\.[^.]+$)")


@dataclass(frozen=True, slots=True)
class Role:
    """A tensor's part, and where: the path of a module, or of the tensor itself where it is whole."""

    path: str
    part: Part


@dataclass(frozen=True, slots=True)
class Layer:
    """All tensors that an adapter has for one module."""

    path: str
    parts: dict[Part, Stored]


def role(name: str) -> Role:
    """The role of a tensor by its name. Names of no known form are taken for whole tensors of that name."""
    path = _WRAPPERS.sub("", name).removeprefix(_PREFIX)
    for part, form in _FORMS:
        if match := form.fullmatch(path):
            return Role(match[1], part)
    return Role(_AROUND.sub("", path), Part.SAVED)


def layers(adapter: str, tensors: Iterable[Stored]) -> list[Layer]:
    """The tensors by module, in the order in which modules are first met.

    Whole tensors and rows of tokens come one by one. Raises BadAdapter where two tensors have the same
    role: the file holds more than one adapter.
    """
    found: dict[tuple[str, Part | None], dict[Part, Stored]] = defaultdict(dict)
    for stored in tensors:
        its = role(stored.name)
        parts = found[its.path, its.part if its.part in (Part.SAVED, Part.TOKENS) else None]
        if its.part in parts:
            raise BadAdapter(
                adapter,
                f"{parts[its.part].name} and {stored.name} are the same part of the same layer: the file "
                "holds several adapters. Save one of them alone: save_pretrained(…, selected_adapters=[…]).",
            )
        parts[its.part] = stored
    return [Layer(path, parts) for (path, _), parts in found.items()]
