"""What a model says about sampling: generation_config.json, and the tokens that end its turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """Sampling for a request that says nothing. Where the model is silent too: the API's own defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    stop_token_ids: frozenset[int] = frozenset()
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @classmethod
    def read(cls, generation_config: Mapping[str, Any], end_ids: Iterable[int] = ()) -> GenerationDefaults:
        """From generation_config.json (transformers' format), where any key may be missing or null.

        `do_sample: false` makes greedy decoding the default. `end_ids` are further tokens that end an answer:
        the tokenizer's and the template's. A value out of range counts as missing.
        """
        config = dict(generation_config)
        temperature = _number(config.get("temperature"), 1.0, low=0.0)
        return cls(
            temperature=0.0 if config.get("do_sample") is False else temperature,
            top_p=_number(config.get("top_p"), 1.0, low=1e-6, high=1.0),
            top_k=int(_number(config.get("top_k"), 0, low=0)),
            repetition_penalty=_number(config.get("repetition_penalty"), 1.0, low=0.01, high=100.0),
            stop_token_ids=frozenset({*_ids(config.get("eos_token_id")), *end_ids}),
            min_p=_number(config.get("min_p"), 0.0, low=0.0, high=1.0),
            presence_penalty=_number(config.get("presence_penalty"), 0.0, low=-2.0, high=2.0),
            frequency_penalty=_number(config.get("frequency_penalty"), 0.0, low=-2.0, high=2.0),
        )


def _number(value: object, default: float, low: float, high: float = float("inf")) -> float:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    return float(value) if valid else default  # type: ignore[arg-type]


def _ids(value: object) -> list[int]:
    """`eos_token_id` is one id or a list of them."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int)]
