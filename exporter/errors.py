"""What can go wrong in an export. Like the loader's errors: types with numbers, a way out, an exit code."""

from __future__ import annotations

from collections.abc import Sequence

from loader.errors import EXIT_BAD_INPUT, EXIT_DOES_NOT_FIT, EXIT_RETRY, EXIT_USAGE, LoaderError

EXIT_DIFFERS = 44
EXIT_VERIFICATION_FAILED = 45
EXIT_STOPPED = 143  # 128 + SIGTERM, as a shell reports it


class ExportError(LoaderError):
    """The base of everything the exporter refuses."""

    exit_code = EXIT_BAD_INPUT


class BadSpec(ExportError):
    """The command line or the TOML file does not describe an export."""

    exit_code = EXIT_USAGE


class BadAdapter(ExportError):
    """An adapter that cannot be read, is of a kind that cannot be merged, or does not fit the base."""

    def __init__(self, adapter: str, reason: str) -> None:
        self.adapter = adapter
        super().__init__(f"{adapter}: {reason}")


class BadQuantization(ExportError):
    """A quantized base of a format, version or shape that cannot be turned back into numbers."""

    def __init__(self, source: str, reason: str) -> None:
        self.source = source
        super().__init__(f"{source}: {reason}")


class NeedsDownload(BadQuantization):
    """A quantized base on the hub whose shapes stand inside its files: planned once it is on this machine."""


class DoesNotFit(ExportError):
    """The disk or the memory limit is too small; known before a weight is read."""

    exit_code = EXIT_DOES_NOT_FIT

    def __init__(self, place: str, need_bytes: int, have_bytes: int, hint: str) -> None:
        self.need_bytes = need_bytes
        self.have_bytes = have_bytes
        super().__init__(f"{place}: needs {need_bytes:,} bytes and has {have_bytes:,}. {hint}")


class OutputDiffers(ExportError):
    """The output folder holds another finished export, which is never overwritten unasked."""

    exit_code = EXIT_DIFFERS


class Busy(ExportError):
    """Another process is writing the same export."""

    exit_code = EXIT_RETRY


class Stopped(ExportError):
    """SIGTERM or SIGINT: finished shards and the journal are kept."""

    exit_code = EXIT_STOPPED


class VerificationFailed(ExportError):
    """What is on the disk is not what was exported, or does not answer as base and adapter do."""

    exit_code = EXIT_VERIFICATION_FAILED

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        super().__init__(f"{source}: {'; '.join(problems[:5])}{more}")


class UnknownLayout(ExportError):
    """A tensor that the architecture has no place for, or two that would get one name."""

    def __init__(self, tensor: str, reason: str) -> None:
        self.tensor = tensor
        super().__init__(f"{tensor}: {reason}")


class BadVocabulary(ExportError):
    """A tokenizer's file that cannot be read, or is of a kind that cannot be converted."""

    def __init__(self, file: str, reason: str) -> None:
        self.file = file
        super().__init__(f"{file}: {reason}")
