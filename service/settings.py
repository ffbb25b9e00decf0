"""Everything `snugfit serve` can be told: one class, frozen, every field with its meaning.

A field is at once a flag, a TOML key and an environment variable (`SNUGFIT_…`). `service.sources` fills the
class from all three: flags win over the environment, that over the file, that over the defaults.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from loader.errors import BadBudget

ENV_PREFIX = "SNUGFIT_"
SECRET_FIELDS = frozenset({"api_key"})
# Two ways to say the same thing: the one a stronger source gives hides the other from weaker sources.
ALTERNATIVES = ("budget", "max_memory")


def _option(group: str, default: Any, metavar: str, accepts: str, meaning: str) -> Any:
    """A field, with what `--help`, docs/config.md and the error for a bad value say about it."""
    extra: dict[str, Any] = {"group": group, "metavar": metavar, "accepts": accepts}
    return Field(default, description=meaning, json_schema_extra=extra)


_model, _memory = partial(_option, "model"), partial(_option, "memory")
_http, _log, _telemetry = partial(_option, "http"), partial(_option, "log"), partial(_option, "telemetry")


def _split_commas(value: object) -> object:
    """Flags and environment variables hold lists as text: "a,b". A TOML list is taken as it is."""
    return tuple(item.strip() for item in value.split(",")) if isinstance(value, str) else value


def _join_limits(value: object) -> object:
    """A TOML table {cpu = "30GiB"} in the textual form "cpu=30GiB"."""
    if isinstance(value, Mapping):
        return ",".join(f"{device}={limit}" for device, limit in value.items())
    return value


def _size_in_bytes(value: object) -> object:
    if not isinstance(value, str):
        return value
    from loader.budget import parse_bytes

    try:
        return parse_bytes(value)
    except BadBudget:
        raise ValueError("is not accepted") from None


Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], NoDecode, BeforeValidator(_split_commas)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_commas)]
Limits = Annotated[str, NoDecode, BeforeValidator(_join_limits)]
ByteSize = Annotated[int, BeforeValidator(_size_in_bytes)]


class Settings(BaseSettings):
    """The configuration of one service, checked and frozen. `Settings()` is all defaults and reads nothing.

    Use `service.sources.load_settings` to fill it from a file, the environment and flags.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix=ENV_PREFIX,
        env_ignore_empty=True,  # compose files and charts pass NAME= for "not set"
        coerce_numbers_to_str=True,  # TOML: budget = 16_000_000_000
        hide_input_in_errors=True,  # an API key must not reach a log
        protected_namespaces=(),
    )

    # fmt: off
    model: str | None = _model(
        None, "MODEL", "a folder or a hub id (owner/name)",
        "Folder or hub id of the model; without it, the built-in demo model.",
    )
    revision: str | None = _model(
        None, "REV", "a branch, tag or commit",
        "Branch, tag or commit of a hub model.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _model(
        "auto", "DTYPE", "auto, bfloat16, float16 or float32",
        "What weights are held in: auto (as in the checkpoint), bfloat16, float16 or float32.",
    )
    chat_template: Path | None = _model(
        None, "FILE", "a readable UTF-8 file",
        "Jinja chat template to use instead of the model's own.",
    )

    budget: str | None = _memory(
        None, "SIZE", "a size (16GB, 12.5GiB) or a share of what is free (80%)",
        "Memory snugfit may use on the device: 16GB (10^9 bytes), 12.5GiB (2^30), 80%. "
        "Without it: from what is free.",
    )
    max_memory: Limits | None = _memory(
        None, "LIMITS", "device=size pairs (0=15GiB,cpu=30GiB,disk=100GB)",
        "Instead of a budget, limits device by device in accelerate's form: 0=15GiB,cpu=30GiB,disk=100GB. "
        "In TOML also a table.",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = _memory(
        "auto", "DEVICE", "auto, cpu, cuda or cuda:N",
        "Where the model runs: auto (the first GPU, or else the CPU), cpu, cuda or cuda:N.",
    )
    context: Annotated[int, Field(ge=1)] | None = _memory(
        None, "TOKENS", "a number of tokens, 1 or more",
        "Tokens that one conversation may hold. Without it: 8192, or as many of them as fit.",
    )
    concurrency: Annotated[int, Field(ge=1)] | None = _memory(
        None, "N", "a number of requests, 1 or more",
        "Requests that run at the same time, at most. They share one KV pool. Without it: 16 on the CPU, 64 "
        "on a GPU, 1 where the model cannot be batched.",
    )

    threads: Annotated[int, Field(ge=1)] | None = _memory(
        None, "N", "a number of threads, 1 or more",
        "Threads that compute on the CPU. Without it: OMP_NUM_THREADS, or one for each core it may use.",
    )

    cpu_isa: Literal["auto", "off", "scalar", "neon", "avx2", "avx512", "avx512_bf16", "amx"] = _memory(
        "auto", "SET", "auto, off, scalar, neon, avx2, avx512, avx512_bf16 or amx",
        "Highest instruction set of the CPU kernels: auto (the best there is), off (torch alone computes), "
        "scalar, neon, avx2, avx512, avx512_bf16 or amx.",
    )
    gpu_kernels: Literal["auto", "off"] = _memory(
        "auto", "MODE", "auto or off",
        "Whether kernels of ours compute the layers on an NVIDIA GPU: auto (of families that they know), off "
        "(torch alone computes).",
    )
    prefix_reuse: Literal["on", "off"] = _memory(
        "on", "MODE", "on or off",
        "Whether a prompt that begins like an earlier one is read only from where they part. By the time it "
        "takes, clients can tell that someone has sent the beginning: off keeps that from them.",
    )

    host: Annotated[str, Field(min_length=1)] = _http(
        "127.0.0.1", "HOST", "a name or an IP address",
        "Address to listen on; 0.0.0.0 is every IPv4 address of the machine.",
    )
    port: Annotated[int, Field(ge=0, le=65535)] = _http(
        8000, "PORT", "a port, 0 to 65535",
        "Port to listen on; 0 takes a free one.",
    )
    api_key: Secrets = _http(
        (), "KEY", "one or more keys, none of them empty",
        "Key that clients must send (Authorization: Bearer). For more, repeat the flag or use commas.",
    )
    api_key_file: Path | None = _http(
        None, "FILE", "a readable UTF-8 file with at least one key",
        "File with one API key per line: keys given this way stand in no process list.",
    )
    served_model_name: Annotated[str, Field(min_length=1)] | None = _http(
        None, "NAME", "a name",
        "Name by which clients ask for the model. Without it: the hub id, or the name of the folder.",
    )
    cors_origins: Names = _http(
        (), "ORIGIN", "origins (https://example.org), or *",
        "Web origin whose pages may call the API; * is any. For more: repeat the flag or use commas.",
    )
    max_body_bytes: Annotated[ByteSize, Field(ge=1024)] = _http(
        1_000_000, "SIZE", "a size of 1KiB or more (1MB)",
        "Largest request body that is read; a larger one is answered with 413.",
    )
    max_queue: Annotated[int, Field(ge=0)] = _http(
        64, "N", "a number of requests, 0 or more",
        "Requests that may wait for their turn; one more is answered with 429.",
    )
    max_wait_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _http(
        600.0, "SECONDS", "seconds, 0 or more",
        "How long a request may wait until it is started, before it is answered with 503; 0: for ever. "
        "The OpenAI SDKs give up after 600.",
    )
    keep_alive_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _http(
        10.0, "SECONDS", "seconds, 0 or more",
        "Silence in a stream after which an SSE comment keeps the connection open; 0: never.",
    )
    drain_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = _http(
        30.0, "SECONDS", "seconds, 0 or more",
        "How long running requests may take to finish after SIGTERM or Ctrl-C.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = _log(
        "info", "LEVEL", "debug, info, warning or error",
        "How much is logged to stderr: debug (with tracebacks), info, warning or error.",
    )
    log_format: Literal["text", "json"] = _log(
        "text", "FORM", "text or json",
        "How a log line looks: text, for a person, or json, one object a line, for a log collector.",
    )
    traces: Literal["on", "off"] = _telemetry(
        "off", "MODE", "on or off",
        "Whether requests are traced with OpenTelemetry, which the OTEL_… variables configure. Needs "
        "snugfit[otel].",
    )
    exemplars: Literal["on", "off"] = _telemetry(
        "off", "MODE", "off, or on where traces are on",
        "Whether histograms name a trace for each bucket, to who scrapes OpenMetrics. Needs traces.",
    )
    vllm_metrics: Literal["on", "off"] = _telemetry(
        "off", "MODE", "on or off",
        "Whether /metrics shows the engine under vLLM's names too, for who knows only those.",
    )
    # fmt: on

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only what is passed in: `service.sources` merges, since it must say where a bad value stood."""
        return (init_settings,)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans(cls, value: object) -> object:
        """No setting is true or false, and pydantic would read `port = true` as 1."""
        if isinstance(value, bool):
            raise ValueError("is not accepted")
        return value

    @field_validator("model", mode="after")
    @classmethod
    def _expand_home(cls, value: str | None) -> str | None:
        """A shell expands ~, a TOML file does not."""
        if value is not None and not value.strip():
            raise ValueError("names nothing")
        return os.path.expanduser(value) if value is not None else None

    @field_validator("api_key", mode="after")
    @classmethod
    def _refuse_empty_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if any(not key.get_secret_value().strip() for key in keys):
            raise ValueError("an empty key would let everyone in")
        return keys

    @field_validator("chat_template", "api_key_file", mode="after")
    @classmethod
    def _must_be_readable(cls, path: Path | None) -> Path | None:
        if path is not None:
            path = path.expanduser()
            _read_text(path)
        return path

    @field_validator("api_key_file", mode="after")
    @classmethod
    def _must_hold_a_key(cls, path: Path | None) -> Path | None:
        if path is not None and not _keys_in(path):
            raise ValueError("holds no key")
        return path

    @field_validator("exemplars", mode="after")
    @classmethod
    def _need_traces(cls, value: str, info: ValidationInfo) -> str:
        """`traces` stands before `exemplars`, and is not there when it was refused itself."""
        if value == "on" and info.data.get("traces") == "off":
            raise ValueError("names traces, and traces are off: turn them on too")
        return value

    @property
    def api_keys(self) -> tuple[str, ...]:
        """Every key that opens the API, in clear; empty: no key is asked for."""
        keys = tuple(key.get_secret_value() for key in self.api_key)
        return keys + (_keys_in(self.api_key_file) if self.api_key_file else ())


def explain(field: str) -> dict[str, str]:
    """What `_option` said about a field: "group", "metavar" and "accepts"."""
    return cast(dict[str, str], Settings.model_fields[field].json_schema_extra)


def _read_text(path: Path) -> str:
    """A file's text; ValueError with the reason when it cannot be had."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as err:
        raise ValueError((err.strerror or "cannot be read").lower()) from err


def _keys_in(path: Path) -> tuple[str, ...]:
    return tuple(line.strip() for line in _read_text(path).splitlines() if line.strip())
