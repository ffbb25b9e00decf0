"""Which models transformers can build as causal language models, asked without importing it or torch.

transformers keeps that in two source files, as lists of (model_type, class); they are parsed, not run. What a
family's model is made of stands in a file of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loader.errors import UnsupportedModel

_CAUSAL = "modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
_KNOWN = "auto_mappings.py", "CONFIG_MAPPING_NAMES"
_FOLDERS = "auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME"
# What an architecture that predicts the next token is called, whatever the family.
_CAUSAL_WORDS = ("CausalLM", "LMHead", "ForConditionalGeneration")
# Their causal classes are for other uses: half of an encoder-decoder, or an encoder turned into a decoder.
_ENCODER_DECODERS = frozenset({
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "moshi", "musicgen",
    "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "trocr", "whisper",
})  # fmt: skip
_ENCODERS = frozenset({
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert",
    "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta",
    "xlm-roberta-xl", "xmod",
})  # fmt: skip


def check_architecture(source: str, config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModel unless transformers has a causal language model for this config.json."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise UnsupportedModel(source, "", "config.json does not name the kind of model (model_type).")
    if reason := _refusal(model_type, config):
        raise UnsupportedModel(source, model_type, reason)


def _refusal(model_type: str, config: Mapping[str, Any]) -> str | None:
    causal = causal_classes()
    if config.get("is_encoder_decoder") or model_type in _ENCODER_DECODERS:
        return "an encoder-decoder. snugfit serves decoder-only language models."
    if causal and model_type not in causal:
        return _unknown(model_type, config)
    if model_type in _ENCODERS and not config.get("is_decoder"):
        return "an encoder, which does not write text. snugfit serves decoder-only language models."
    names = config.get("architectures") or []
    if isinstance(names, list) and names and not any(_is_causal(str(name), causal) for name in names):
        return f"its architecture is {names[0]}, which does not write text: it lacks the head for that."
    return None


def _unknown(model_type: str, config: Mapping[str, Any]) -> str:
    installed = f"transformers {version('transformers')}"
    if knows(model_type):
        return f"{installed} has it, but not as a causal language model."
    if config.get("auto_map"):
        return (
            "it brings its own Python code (auto_map), which snugfit never runs: trust_remote_code is off. "
            "Look for a version of the model that transformers supports by itself."
        )
    return f"{installed} does not know it. A newer one may: pip install -U transformers."


def _is_causal(name: str, causal: Mapping[str, str]) -> bool:
    return any(word in name for word in _CAUSAL_WORDS) or name in causal.values()


def knows(model_type: str) -> bool:
    """Whether the installed transformers has classes of its own for a model_type."""
    return model_type in _names(*_KNOWN)


def causal_classes() -> Mapping[str, str]:
    """model_type -> class, for all that AutoModelForCausalLM builds."""
    return _names(*_CAUSAL)


def modeling_source(model_type: str) -> str:
    """The text of the file with the family's model; "" where there is none."""
    folder = _names(*_FOLDERS).get(model_type, model_type.replace("-", "_"))
    return _source(folder, f"modeling_{folder}.py") if folder.isidentifier() else ""


@cache
def _names(file: str, variable: str) -> dict[str, str]:
    """The OrderedDict([(…, …), …]) that a file of transformers.models.auto assigns to a variable.

    Empty when a later transformers keeps it elsewhere: then nothing is refused here, and `load` finds out.
    """
    for node in ast.parse(_source("auto", file)).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and any(isinstance(target, ast.Name) and target.id == variable for target in node.targets)
        ):
            return dict(ast.literal_eval(node.value.args[0]))
    return {}


def _source(folder: str, file: str) -> str:
    """The text of a file of transformers.models; "" where there is none."""
    spec = find_spec("transformers")
    folders = spec.submodule_search_locations if spec else None
    path = Path(next(iter(folders or [""])), "models", folder, file)
    return path.read_text(encoding="utf-8") if path.is_file() else ""
