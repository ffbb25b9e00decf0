"""What can go wrong before and while a model is put into memory.

Every error is a type with its numbers as attributes and a message that says what was wrong and what to do.
`exit_code` is the process exit code of the command that meets it (docs/architecture.md lists them);
the HTTP layer and the CLI choose by type, never by the text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

EXIT_USAGE = 2
EXIT_BAD_INPUT = 42
EXIT_DOES_NOT_FIT = 43
EXIT_RETRY = 75
EXIT_INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


class LoaderError(Exception):
    """The base of everything the loader refuses."""

    exit_code = EXIT_BAD_INPUT


class BadBudget(LoaderError):
    """A budget, a size or a device map that cannot be read as one."""

    exit_code = EXIT_USAGE


class BadPlanRequest(LoaderError):
    """A context, concurrency or dtype that makes no sense for this model."""

    exit_code = EXIT_USAGE


class BudgetExceeded(LoaderError):
    """Nothing that may be given up makes the model fit.

    `smallest_bytes` is the smallest budget of `device` under which the same request would be planned.
    """

    exit_code = EXIT_DOES_NOT_FIT

    def __init__(
        self,
        device: str,
        need_bytes: int,
        have_bytes: int,
        smallest_bytes: int,
        hint: str,
        weights_bytes: int = 0,
        kv_bytes_per_token: int = 0,
    ) -> None:
        self.weights_bytes = weights_bytes
        self.kv_bytes_per_token = kv_bytes_per_token
        self.device = device
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes
        self.smallest_bytes = smallest_bytes
        self.hint = hint
        super().__init__(
            f"does not fit: {device} needs {need_bytes:,} bytes and the budget is {have_bytes:,}; "
            f"the smallest budget that works is {smallest_bytes:,} bytes. {hint}"
        )


class OverBudget(LoaderError):
    """Measured memory passed the budget while loading or rehearsing: the plan was wrong."""

    exit_code = EXIT_DOES_NOT_FIT

    def __init__(self, device: str, measured_bytes: int, budget_bytes: int, hint: str) -> None:
        self.device = device
        self.measured_bytes = measured_bytes
        self.budget_bytes = budget_bytes
        super().__init__(
            f"{device}: measured {measured_bytes:,} bytes against a budget of {budget_bytes:,}. {hint}"
        )


class CudaTakesMore(LoaderError):
    """CUDA itself takes more of this GPU than the plan has put aside, and the plan has no room for that."""

    exit_code = EXIT_DOES_NOT_FIT

    def __init__(self, device: str, context_bytes: int, need_bytes: int, budget_bytes: int) -> None:
        self.device = device
        self.context_bytes = context_bytes
        self.need_bytes = need_bytes
        self.budget_bytes = budget_bytes
        super().__init__(
            f"{device}: CUDA itself takes {context_bytes:,} bytes of this card, more than was planned. With "
            f"it the model needs {need_bytes:,} and the budget is {budget_bytes:,}. Give a larger budget, or "
            "a shorter --context."
        )


class OutOfMemory(LoaderError):
    """The device had less to give than the plan counted on: the cap held, and loading ended."""

    exit_code = EXIT_DOES_NOT_FIT

    def __init__(self, phase: str, planned_bytes: int, reason: str) -> None:
        self.planned_bytes = planned_bytes
        super().__init__(
            f"out of memory while {phase}; the plan counted on a peak of {planned_bytes:,} bytes. "
            f"Give a shorter --context, or a smaller budget so that more is offloaded. ({reason})"
        )


class DeviceUnavailable(LoaderError):
    """The plan is for a device that this machine lacks, or that another process has filled."""

    exit_code = EXIT_DOES_NOT_FIT


class BadCheckpoint(LoaderError):
    """A model folder that cannot be read as one."""


class NotAModel(BadCheckpoint):
    """What was given is neither a model's folder nor a hub id, or cannot be opened."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        super().__init__(f"{source}: {reason}")


class NoConfig(BadCheckpoint):
    """There is no config.json, or it is not the description of a model."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        super().__init__(f"{source}: {reason}")


class NoWeights(BadCheckpoint):
    """A folder with a config and no weights."""

    def __init__(self, source: str, gguf: Sequence[str] = ()) -> None:
        instead = f" ({gguf[0]} is GGUF, which snugfit does not read)" if gguf else ""
        super().__init__(
            f"{source}: holds a config.json but no *.safetensors file{instead}. "
            "Download the weights too, or give the folder that has them."
        )


class PickleWeights(BadCheckpoint):
    """Weights are only there as pickles, which can run code when they are opened."""

    def __init__(self, source: str, names: Sequence[str]) -> None:
        self.names = tuple(names)
        super().__init__(
            f"{source}: weights are only in pickle files "
            f"({', '.join(names[:3])}{', …' if len(names) > 3 else ''}), which can run code when they are "
            "opened, so snugfit never opens them. Convert once, in a place you "
            'trust: python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('FOLDER', dtype='auto').save_pretrained('OUT')\" "
            "and copy the tokenizer files to OUT."
        )


class MissingShard(BadCheckpoint):
    """The index names files that are not there."""

    def __init__(self, source: str, missing: Sequence[str], expected: int) -> None:
        self.missing = tuple(missing)
        super().__init__(
            f"{source}: {len(missing)} of {expected} shards are missing: {', '.join(missing[:5])}"
            f"{', …' if len(missing) > 5 else ''}. Download them again into the same folder."
        )


class BadIndex(BadCheckpoint):
    """The index and the shards do not belong together."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        super().__init__(f"{source}: {reason}")


class TruncatedShard(BadCheckpoint):
    """A file is shorter (or longer) than its own header says."""

    def __init__(self, file: str, expected_bytes: int, actual_bytes: int) -> None:
        self.expected_bytes = expected_bytes
        self.actual_bytes = actual_bytes
        super().__init__(
            f"{file}: its header describes {expected_bytes:,} bytes and the file has {actual_bytes:,} "
            f"({actual_bytes - expected_bytes:+,}). The download broke off or the file was changed: fetch it "
            "again."
        )


class BadHeader(BadCheckpoint):
    """The first bytes of a file are not a safetensors header."""

    def __init__(self, file: str, reason: str) -> None:
        super().__init__(f"{file}: not a safetensors file: {reason}. Fetch it again.")


class LfsPointer(BadCheckpoint):
    """A Git-LFS pointer stands where the file should be."""

    def __init__(self, file: str, real_bytes: int) -> None:
        self.real_bytes = real_bytes
        super().__init__(
            f"{file}: is a Git-LFS pointer, not the file itself ({real_bytes:,} bytes). "
            "Run `git lfs install && git lfs pull` in the model's folder."
        )


class QuantizedCheckpoint(BadCheckpoint):
    """The weights are quantized; snugfit loads 16- and 32-bit floats."""

    def __init__(self, source: str, method: str) -> None:
        self.method = method
        super().__init__(
            f"{source}: its weights are quantized ({method}); snugfit loads bf16, fp16 and fp32. "
            f"Turn it into bf16 first: snugfit export --base {source} --out {Path(source).name}-bf16"
        )


class UnsupportedModel(BadCheckpoint):
    """transformers has no causal language model of this kind, or it needs code from the checkpoint."""

    def __init__(self, source: str, model_type: str, reason: str) -> None:
        self.model_type = model_type
        super().__init__(f"{source}: model_type {model_type!r}: {reason}")


class TensorMismatch(BadCheckpoint):
    """The checkpoint's tensors and the architecture's parameters differ; `load` finds that."""

    def __init__(
        self, source: str, missing: Sequence[str], unexpected: Sequence[str], wrong: Sequence[str]
    ) -> None:
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)
        self.wrong = tuple(wrong)
        parts = [
            f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
            for names, what in (
                (missing, "that the architecture needs are missing"),
                (unexpected, "that the architecture lacks"),
                (wrong, "of another shape"),
            )
            if names
        ]
        super().__init__(
            f"{source}: tensors do not match the architecture in config.json: {'; '.join(parts)}. "
            "The config and the weights belong to different models, or the export was cut short."
        )


class TiedWeightsDiffer(BadCheckpoint):
    """config.json ties two matrices that the file has both of, with different values; `load` finds that."""

    def __init__(self, source: str, name: str, copy: str) -> None:
        super().__init__(
            f"{source}: config.json says that {name} and {copy} are one matrix (tie_word_embeddings); the "
            'file holds two that differ. If they were trained apart, set "tie_word_embeddings": false there.'
        )


class HubError(LoaderError):
    """The hub could not be asked: unknown model, no token, offline, or no network."""

    def __init__(self, source: str, reason: str, retry: bool = False) -> None:
        self.retry = retry
        self.exit_code = EXIT_RETRY if retry else EXIT_BAD_INPUT
        super().__init__(f"{source}: {reason}")
