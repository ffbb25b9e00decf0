"""Where our log lines go: to stderr, so that stdout holds only what a command was asked for."""

from __future__ import annotations

import logging
import sys

FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def to_stderr(level: str) -> None:
    """Send the records of `loader` and `service` to stderr from `level` ("debug" … "error") upwards."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    for package in ("loader", "service"):
        logger = logging.getLogger(package)
        logger.handlers = [handler]
        logger.setLevel(level.upper())
        logger.propagate = False
