"""Where our log lines go: to stderr, so that stdout holds only what a command was asked for.

No line has a prompt, an answer or an API key in it. What we write ourselves has none; and the message of an
exception that ends a request may quote the request, so of those only the type and the place are written.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from asyncio import AbstractEventLoop
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

TEXT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
OURS = ("loader", "service")
# Libraries that send their lines to stderr themselves, as text.
TALKERS = ("transformers", "huggingface_hub", "accelerate", "torch")

# Packages whose exceptions never have the text of a request in their message.
QUOTE_NOTHING = ("loader.", "service.engine.")
# Libraries that log the exceptions of requests, also where it is no longer known of which.
RUN_REQUESTS = ("asyncio", "uvicorn")

# Of the request that is being answered; "" outside of one.
request_id: ContextVar[str] = ContextVar("request_id", default="")
trace_id: ContextVar[str] = ContextVar("trace_id", default="")


def to_stderr(level: str, form: str = "text") -> None:
    """Send the records of `loader` and `service` to stderr from `level` ("debug" … "error") upwards.

    So are everybody else's warnings, whose exceptions may quote a request as well. In `form` "json" those of
    Python too, so that every line of stderr is one object.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Json() if form == "json" else Text(TEXT))
    for package in OURS:
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.ERROR if level == "error" else logging.WARNING)
    if form == "json":
        logging.captureWarnings(True)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the library is imported


def are_json() -> bool:
    """Whether `to_stderr` was told so."""
    return any(isinstance(handler.formatter, Json) for handler in logging.getLogger().handlers)


def adopt_libraries() -> None:
    """After the import of libraries that print for themselves: their lines become ours, and come once."""
    for name in TALKERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True


def loop_error(_loop: AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """Exception handler of an event loop. asyncio's own writes out tasks and arguments, which may quote."""
    words, *_ = re.split(r"[<(]", context["message"])  # what follows are a callback's arguments
    logging.getLogger("asyncio").error("%s", words.rstrip(), exc_info=context.get("exception"))


class Text(logging.Formatter):
    """A line for a person."""

    def format(self, record: logging.LogRecord) -> str:
        if record.exc_info and record.exc_info[1]:
            record.exc_text = _exception_text(record, record.exc_info[1])
        return super().format(record)


class Json(logging.Formatter):
    """One object a line. What a record has as `extra={"fields": {…}}` becomes keys of the object."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _rfc3339(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_of_request(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and record.exc_info[1]:
            line["exception"] = _exception_text(record, record.exc_info[1])
        return json.dumps(line, ensure_ascii=False, default=str)


def _exception_text(record: logging.LogRecord, err: BaseException) -> str:
    """A traceback. Within a request, only errors whose words are ours say more than their type."""
    may_quote = bool(request_id.get()) or record.name.partition(".")[0] in RUN_REQUESTS
    parts = [_one(each, may_quote) for each in reversed(list(_chain(err)))]
    return "\nDuring the handling of this one came another:\n".join(parts)


def _chain(err: BaseException | None) -> Iterator[BaseException]:
    """The error, what it came from, what that came from."""
    seen: set[int] = set()
    while err is not None and id(err) not in seen:
        seen.add(id(err))
        yield err
        err = err.__cause__ or (None if err.__suppress_context__ else err.__context__)


def _one(err: BaseException, may_quote: bool) -> str:
    kind = type(err)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    left_out = may_quote and not kind.__module__.startswith(QUOTE_NOTHING)
    words = " (its message is left out: it may quote the request)" if left_out else f": {err}"
    return "".join(["Traceback:\n", *traceback.format_tb(err.__traceback__), name, words])


def _of_request() -> dict[str, str]:
    known = {"request_id": request_id.get(), "trace_id": trace_id.get()}
    return {name: value for name, value in known.items() if value}


def _rfc3339(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
