"""generation_config.json of the output: the base's, mended where it contradicts itself.

transformers refuses to save a generation config that asks for what it does not read, at the end of a merge
that took an hour. Here it is mended beforehand, by the rules of GenerationConfig.validate(strict=True) and of
the logits processors of transformers 5.23. Every mend is a note, and nothing in the file makes an export
fail.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

from exporter.outputs.config import text_configs
from exporter.outputs.wording import listed

# Keys of older config.json files that belong into generation_config.json.
_GENERATION_KEYS = (
    "max_length", "max_new_tokens", "min_length", "do_sample", "early_stopping", "num_beams", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "num_return_sequences", "suppress_tokens", "begin_suppress_tokens",
    "forced_bos_token_id", "forced_eos_token_id", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
# Arguments of generate() that no file can hold, and what it takes as an object of torch.compile only.
_NOT_FOR_FILES = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model",
    "streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "compile_config",
    "_original_object_hash", "_commit_hash",
)  # fmt: skip
# Read only when sampling -> the value at which transformers takes it for not given.
_SAMPLING: Mapping[str, Any] = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "top_h": None, "typical_p": 1.0,
    "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
# The value at which it changes nothing.
_NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0, "top_h": 1, "typical_p": 1}
_GREEDY_TEMPERATURE = 1e-5  # as low as this, it is a way to say greedy
_CACHES = frozenset({
    "static", "offloaded_static", "dynamic", "offloaded", "quantized", "sliding_window", "hybrid",
    "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked", "paged",
})  # fmt: skip
_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")
_FLAGS = (
    "do_sample", "use_cache", "return_dict_in_generate", "renormalize_logits", "remove_invalid_values",
    "token_healing", "use_mtp", *_OUTPUTS,
)  # fmt: skip

Number = int | float
_INTS: Mapping[str, Callable[[Number], bool]] = {
    "max_new_tokens": lambda n: n > 0, "max_length": lambda n: n > 0, "min_length": lambda n: n >= 0,
    "min_new_tokens": lambda n: n >= 0, "num_beams": lambda n: n >= 1, "top_k": lambda n: n >= 0,
    "num_return_sequences": lambda n: n >= 1, "pad_token_id": lambda n: n >= 0,
    "no_repeat_ngram_size": lambda n: n >= 0, "encoder_no_repeat_ngram_size": lambda n: n >= 0,
}  # fmt: skip
_REALS: Mapping[str, Callable[[Number], bool]] = {
    "temperature": lambda x: x >= 0, "top_p": lambda x: 0 <= x <= 1, "min_p": lambda x: 0 <= x <= 1,
    "top_h": lambda x: 0 < x <= 1, "typical_p": lambda x: 0 < x <= 1, "epsilon_cutoff": lambda x: 0 <= x < 1,
    "eta_cutoff": lambda x: 0 <= x < 1, "repetition_penalty": lambda x: x > 0,
    "encoder_repetition_penalty": lambda x: x > 0, "length_penalty": isfinite,
    "assistant_ensemble_weight": lambda x: 0 < x < 1, "max_time": lambda x: x > 0,
    "guidance_scale": isfinite,
}  # fmt: skip


def output_generation_config(
    base: Mapping[str, Any] | None, config: Mapping[str, Any], trained_eos: int | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """(generation_config.json of the output, what was mended in it, one sentence each).

    `base` is the base's own; None where it has none, and then it is made of what `config`, the output's
    config.json, says of generation; empty if that is nothing. `trained_eos` is the token that ends a text in
    a tokenizer that came with an adapter: an answer has to end there too.
    """
    mending = _Mending(_from_config(config) if base is None else base)
    mending.drop_what_no_file_can_hold()
    mending.check_values()
    mending.end_somewhere(config, trained_eos)
    mending.choose_sampling()
    mending.check_beams()
    mending.check_cache()
    mending.check_tokens()
    return mending.config, tuple(mending.notes)


def _from_config(config: Mapping[str, Any]) -> dict[str, Any]:
    nested = next(text_configs(config), {})
    merged = {**nested, **{key: value for key, value in config.items() if value is not None}}
    return {key: merged[key] for key in _GENERATION_KEYS if merged.get(key) is not None}


class _Mending:
    """A generation config on its way to one that transformers saves; each method keeps one rule."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)
        self.notes: list[str] = []

    def drop_what_no_file_can_hold(self) -> None:
        for key in _NOT_FOR_FILES:
            if self.config.pop(key, None) is not None and not key.startswith("_"):
                self._note(f"{key} is left out: transformers takes it from the caller only")
        watermark = self.config.get("watermarking_config")
        if watermark is not None and not _is_watermark(watermark):
            self._drop("watermarking_config", "it is none that transformers reads")

    def check_values(self) -> None:
        for key, value in list(self.config.items()):
            if value is not None:
                self._check_value(key, value)

    def _check_value(self, key: str, value: Any) -> None:
        if key == "top_k" and value == -1:  # how vLLM says off
            self._set(key, 0, "-1 is how vLLM says off, and transformers refuses it")
        elif key in _INTS:
            self._check_number(key, value, int, _INTS[key])
        elif key in _REALS:
            self._check_number(key, value, float, _REALS[key])
        elif key in _FLAGS and not isinstance(value, bool):
            if value in (0, 1):
                self._set(key, bool(value), "it is true or false")
            else:
                self._drop(key, "it is true or false")
        elif key in ("eos_token_id", "bos_token_id") and not _are_ids(value):
            self._drop(key, "it is not a token's id")
        elif key == "early_stopping" and not (isinstance(value, bool) or value == "never"):
            self._drop(key, "it is true, false or never")
        elif isinstance(value, float) and not isfinite(value):
            self._drop(key, "it is not a number in JSON")

    def _check_number(
        self, key: str, value: Any, kind: type[int] | type[float], is_valid: Callable[[Number], bool]
    ) -> None:
        if not _is_number(value) or not is_valid(value) or kind(value) != value:
            self._drop(key, "transformers refuses that value")
        else:  # it looks at the type too: 2 is no temperature, and 50.0 no top_k
            self.config[key] = kind(value)

    def end_somewhere(self, config: Mapping[str, Any], trained_eos: int | None) -> None:
        if self.config.get("eos_token_id") in (None, []):
            ends = _from_config(config).get("eos_token_id", [])
            if ends != [] and _are_ids(ends):
                self._set("eos_token_id", ends, "config.json has it, and without it no answer ends")
        found = self.config.get("eos_token_id")
        ends = found if isinstance(found, list) else [] if found is None else [found]
        if trained_eos is not None and trained_eos not in ends:
            why = "the adapter's tokenizer ends a text with it"
            self._set("eos_token_id", [*ends, trained_eos] if ends else trained_eos, why)

    def choose_sampling(self) -> None:
        """do_sample and the parameters of sampling have to agree.

        Where do_sample is not given, parameters that change something say that sampling is meant: vLLM
        (get_diff_sampling_param) and snugfit read them without it. Where it is false, that is the model's
        word.
        """
        given = {key: self.config[key] for key, unset in _SAMPLING.items() if self._differs(key, unset)}
        meant = {key: value for key, value in given.items() if value != _NEUTRAL.get(key)}
        is_cold = given.get("temperature", 1) <= _GREEDY_TEMPERATURE
        if self.config.get("do_sample") is True:
            if given.get("temperature") == 0:
                self._make_greedy(given, "transformers cannot sample at temperature 0, which means just that")
        elif self.config.get("do_sample") is False or is_cold or self._beams() > 1:
            if given:
                self._make_greedy(given, "that is what the model asks for, and only sampling reads the rest")
        elif meant:
            self._set("do_sample", True, f"only sampling reads {_listed(meant)}")
        else:
            for key in given:
                self._drop(key, "only sampling reads it, and it changes nothing there")

    def _make_greedy(self, given: Mapping[str, Any], why: str) -> None:
        vllm = ""
        if self._beams() == 1 and any(key in given for key in ("temperature", "top_p", "top_k", "min_p")):
            vllm = ". vLLM does not read do_sample: ask it for temperature 0"
        self.config["do_sample"] = False
        for key in given:
            del self.config[key]
        self._note(f"do_sample is false, without {_listed(given)}: {why}{vllm}")

    def check_beams(self) -> None:
        beams = self._beams()
        if beams == 1:
            for key, unset in (("early_stopping", False), ("length_penalty", 1.0)):
                if self._differs(key, unset):
                    self._drop(key, "only beam search reads it, and num_beams is 1")
        answers = self.config.get("num_return_sequences") or 1
        if answers > 1 and (answers > beams if beams > 1 else self.config.get("do_sample") is not True):
            self._drop("num_return_sequences", "so many different answers there are not without sampling")

    def check_cache(self) -> None:
        cache = self.config.get("cache_implementation")
        if cache is not None and not (isinstance(cache, str) and cache in _CACHES):
            self._drop("cache_implementation", "transformers has no such cache")
        if self.config.get("use_cache") is False:
            for key in ("cache_implementation", "cache_config"):
                if self.config.get(key) is not None:
                    self._drop(key, "use_cache is false")
        if self.config.get("return_dict_in_generate") is not True:
            for key in _OUTPUTS:
                if self.config.get(key) is True:
                    self._drop(key, "return_dict_in_generate is not true")

    def check_tokens(self) -> None:
        suppressed = self.config.get("suppress_tokens")
        if suppressed is not None and not (isinstance(suppressed, list) and _are_ids(suppressed)):
            self._drop("suppress_tokens", "it is not a list of tokens' ids")
        suppressed = self.config.get("suppress_tokens") or []
        for key in ("forced_bos_token_id", "forced_eos_token_id"):
            forced = self.config.get(key)
            if forced is None:
                continue
            if not _are_ids(forced):
                self._drop(key, "it is not a token's id")
            elif set(forced if isinstance(forced, list) else [forced]) <= set(suppressed) and forced != []:
                self._drop(key, "suppress_tokens forbids what it forces, and nothing could be chosen")

    def _differs(self, key: str, unset: Any) -> bool:
        return self.config.get(key) not in (None, unset)

    def _beams(self) -> int:
        return self.config.get("num_beams") or 1

    def _set(self, key: str, value: Any, why: str) -> None:
        self.config[key] = value
        self._note(f"{key} is {json.dumps(value)} now: {why}")

    def _drop(self, key: str, why: str) -> None:
        self._note(f"{key} {_shown(self.config.pop(key))} is left out: {why}")

    def _note(self, text: str) -> None:
        self.notes.append(f"generation_config.json: {text}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _are_ids(value: object) -> bool:
    """One token id, or a list of them."""
    ids = value if isinstance(value, list) else [value]
    return all(type(item) is int and item >= 0 for item in ids)


def _is_watermark(value: object) -> bool:
    """transformers.WatermarkingConfig as a file writes it."""
    if not isinstance(value, Mapping):
        return False
    ratio, width = value.get("greenlist_ratio", 0.25), value.get("context_width", 1)
    return (
        set(value) <= {"greenlist_ratio", "bias", "hashing_key", "seeding_scheme", "context_width"}
        and value.get("seeding_scheme", "lefthash") in ("lefthash", "selfhash")
        and _is_number(ratio) and 0 <= ratio <= 1
        and _is_number(width) and width >= 1
    )  # fmt: skip


def _listed(values: Mapping[str, Any]) -> str:
    """ "temperature 0.7 and top_p 0.8" """
    return listed([f"{key} {_shown(value)}" for key, value in values.items()])


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
