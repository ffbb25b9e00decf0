"""The CPU kernels, where they are built; and the process's loggers, which a test leaves as they were."""

import logging

import pytest

from service import logs
from service.engine.cpu import library

LOGGERS = (*logs.OURS, *logs.TALKERS, None)  # None: the root


@pytest.fixture(autouse=True)
def loggers_as_before():
    """A command sends the records of the whole process to the stderr of its test, which ends with it."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="session")
def kernels():
    found = library.kernels()
    if found is None:
        pytest.skip("the kernels are not built: there was no C++ compiler")
    return found


@pytest.fixture(params=library.ISAS)
def isa(request, kernels):
    """The kernels on each instruction set that this machine has, with two threads."""
    wanted = library.ISAS.index(request.param)
    used = library.ISAS[kernels.init(wanted, 2, library.gomp_parallel())]
    yield request.param if used == request.param else pytest.skip(f"this machine has no {request.param}")
    kernels.init(-1, 2, library.gomp_parallel())
