import logging
import re

import pytest

from service import logs

PACKAGES = ("loader", "service")


@pytest.fixture(autouse=True)
def as_before():
    """`to_stderr` changes loggers of the whole process."""
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def say(logger, level=logging.INFO, text="it is said"):
    logging.getLogger(logger).log(level, text)


@pytest.mark.parametrize("logger", ["loader", "service", "loader.plan", "service.engine.engine"])
def test_our_log_goes_to_stderr_and_stdout_stays_clean(capsys, logger):
    logs.to_stderr("info")
    say(logger)
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d,\d{{3}} INFO    {logger}: it is said\n", err)


@pytest.mark.parametrize("name", ["debug", "info", "warning", "error"])
def test_every_level_that_the_settings_accept_shows_itself_and_what_is_graver(capsys, name):
    logs.to_stderr(name)
    levels = [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL]
    for level in levels:
        say("service.app", level, logging.getLevelName(level).lower())
    shown = [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    every = [logging.getLevelName(level).lower() for level in levels]
    assert shown == every[every.index(name) :]


def test_a_line_is_there_once_however_often_it_was_set_up_and_whatever_the_root_does(capsys):
    root = logging.getLogger()
    others = logging.StreamHandler()
    root.addHandler(others)
    try:
        logs.to_stderr("info")
        logs.to_stderr("info")
        say("service.app")
    finally:
        root.removeHandler(others)
    assert capsys.readouterr().err.count("it is said") == 1


def test_the_last_level_holds(capsys):
    logs.to_stderr("debug")
    logs.to_stderr("error")
    say("service.app", logging.WARNING)
    assert capsys.readouterr().err == ""


def test_other_libraries_are_left_alone():
    others = [logging.getLogger(name) for name in ("", "uvicorn", "httpx", "transformers", "services")]
    before = [(list(logger.handlers), logger.level, logger.propagate) for logger in others]
    logs.to_stderr("debug")
    assert [(list(logger.handlers), logger.level, logger.propagate) for logger in others] == before
