"""Where settings come from: flags, environment, TOML file; merged so that a complaint names its source."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from pydantic_settings import EnvSettingsSource

from loader.usage import UsageError, nearest
from service.settings import ALTERNATIVES, ENV_PREFIX, SECRET_FIELDS, Settings, explain

CONFIG_ENV = f"{ENV_PREFIX}CONFIG"
# What Kubernetes puts into every pod beside a Service that is named snugfit.
_SERVICE_LINK = re.compile(
    r"SNUGFIT_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)"
)
_SERVICE_LINK_HINT = (
    "looks like a Kubernetes service link, not a setting: "
    "set `enableServiceLinks: false` in the pod, or rename the Service"
)


@dataclass(frozen=True)
class Source:
    """Values from one place. `label` writes the name that a person typed there."""

    values: Mapping[str, Any]
    kind: str  # "flag" | "environment" | "file"
    file: Path | None = None

    def label(self, field: str) -> str:
        if self.kind == "flag":
            return flag_name(field)
        return env_name(field) if self.kind == "environment" else f"{self.file}: {field}"


def flag_name(field: str) -> str:
    """`max_memory` -> `--max-memory`; the model is the one positional argument."""
    return "MODEL" if field == "model" else "--" + field.replace("_", "-")


def env_name(field: str) -> str:
    return ENV_PREFIX + field.upper()


def load_settings(
    flags: Mapping[str, Any], config: Path | None = None, *, hidden: frozenset[str] = frozenset()
) -> Settings:
    """Settings from flags over the environment over the file (`config`, else SNUGFIT_CONFIG) over defaults.

    `flags` holds only what was typed, by field name. Fields in `hidden` are not taken from the environment or
    the file, because a flag of the command stands for them. Raises UsageError.
    """
    if config is None and os.environ.get(CONFIG_ENV):
        config = Path(os.environ[CONFIG_ENV])
    sources = [Source(flags, "flag"), _environment()]
    if config is not None:
        sources.append(_file(config))
    merged = _merge(sources, hidden)
    try:
        return Settings(**{field: source.values[field] for field, source in merged.items()})
    except ValidationError as err:
        raise UsageError(_explain(err, merged)) from None


def _environment() -> Source:
    """What SNUGFIT_… variables say; one that is no setting is an error (pydantic-settings lets it pass)."""
    known = {env_name(field) for field in Settings.model_fields} | {CONFIG_ENV}
    names = [name for name in os.environ if name.upper().startswith(ENV_PREFIX)]
    links = [n for n in names if _SERVICE_LINK.fullmatch(n) and (n not in known or "://" in os.environ[n])]
    if links:
        raise UsageError([f"{links[0]}={os.environ[links[0]]} {_SERVICE_LINK_HINT}"])
    unknown = [name for name in names if name.upper() not in known]
    if unknown:
        raise UsageError(f"{name}: no such setting{nearest(name.upper(), known)}" for name in unknown)
    return Source(EnvSettingsSource(Settings)(), "environment")


def _file(path: Path) -> Source:
    try:
        values = tomllib.loads(
            path.read_text(encoding="utf-8-sig")
        )  # editors on Windows write a byte order mark
    except OSError as err:
        raise UsageError([f"{path}: {(err.strerror or 'cannot be read').lower()}"]) from None
    except UnicodeDecodeError as err:
        raise UsageError([f"{path}: not UTF-8 text (byte {err.start})"]) from None
    except tomllib.TOMLDecodeError as err:
        raise UsageError([f"{path}: not TOML: {err}"]) from None
    unknown = [key for key in values if key not in Settings.model_fields]
    if unknown:
        raise UsageError(
            f"{path}: {key}: no such setting{nearest(key.replace('-', '_'), Settings.model_fields)}"
            for key in unknown
        )
    return Source(values, "file", path)


def _merge(sources: Iterable[Source], hidden: frozenset[str]) -> dict[str, Source]:
    """Which source each field is taken from, the strongest first in `sources`."""
    merged: dict[str, Source] = {}
    for source in sources:
        said = [field for field in ALTERNATIVES if field in source.values]
        if len(said) > 1:
            raise UsageError([f"{' and '.join(source.label(field) for field in said)}: give one of them"])
        decided = any(field in merged for field in ALTERNATIVES)
        for field in source.values:
            weaker = (decided and field in ALTERNATIVES) or (field in hidden and source.kind != "flag")
            if field not in merged and not weaker:
                merged[field] = source
    return merged


def _explain(err: ValidationError, merged: Mapping[str, Source]) -> list[str]:
    """One sentence per field: where the value came from, the value (never a secret) and what is accepted."""
    sentences: dict[str, str] = {}
    for detail in err.errors(include_url=False, include_context=False):
        field = str(detail["loc"][0])
        source = merged[field]
        value = source.values[field]
        shown = "" if field in SECRET_FIELDS else f" {_text(value)}"
        sentences.setdefault(
            field, f"{source.label(field)}:{shown}{_reason(detail)}; accepted: {explain(field)['accepts']}"
        )
    return list(sentences.values())


def _text(value: object) -> str:
    """A value as it was typed, or a TOML list as Python writes it."""
    return repr(str(value)) if isinstance(value, str | Path) else repr(value)


def _reason(detail: ErrorDetails) -> str:
    """Our own validators say what is wrong; for pydantic's, the accepted forms say it better."""
    own = detail["type"] == "value_error"
    return f" {detail['msg'].removeprefix('Value error, ')}" if own else " is not accepted"
