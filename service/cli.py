"""The command `snugfit`: finds the subcommand, and turns what goes wrong into a sentence and an exit code.

Nothing heavy is imported here: a command is a line in COMMANDS and a module that is imported when it is asked
for. The exit codes of all commands are listed in docs/architecture.md.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from loader.errors import EXIT_INTERRUPTED, LoaderError
from loader.usage import NOT_INSTALLED, Parser, UsageError, nearest, never_fail_on_a_character, version

EXIT_BROKEN_PIPE = 1  # as rich has it
TRY_HELP = "Try 'snugfit --help'."


@dataclass(frozen=True)
class Command:
    """One subcommand: `module` has `run(argv) -> exit code`, or is a program (`python -m module`)."""

    module: str
    sentence: str
    is_program: bool = False


COMMANDS = {
    "plan": Command(
        "service.plan_command", "what goes where, and how much context fits, before a weight is read"
    ),
    "serve": Command("service.serve_command", "load a model inside a memory budget and serve the OpenAI API"),
    "export": Command(
        "exporter",
        "merge LoRA adapters into a base of any precision; write bf16 safetensors",
        is_program=True,
    ),
    "verify": Command("exporter", "read a finished export again and compare every byte", is_program=True),
    "chat": Command("service.chat_client", "talk to a running server in the terminal, or start one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    argv = sys.argv[1:] if argv is None else argv
    never_fail_on_a_character()
    try:
        code = _dispatch(argv)
        sys.stdout.flush()  # here, where a broken pipe is caught, and not when the interpreter ends
        return code
    except (LoaderError, UsageError) as err:
        return _refuse(err)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `snugfit plan … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _dispatch(argv: Sequence[str]) -> int:
    if argv and argv[0] in COMMANDS:
        command = COMMANDS[argv[0]]
        return _become(command.module, argv) if command.is_program else _run(command, argv[1:])
    if argv and not argv[0].startswith("-"):
        near = nearest(argv[0], COMMANDS) or f"; to serve a model: snugfit serve {argv[0]}."
        raise UsageError([f"{argv[0]}: no such command{near} {TRY_HELP}"])
    parser = _top_parser()
    if argv and not parser.nearest(argv[0]):
        raise UsageError(
            [f"{argv[0]} belongs behind a command, as in `snugfit serve {argv[0]} …`. {TRY_HELP}"]
        )
    parser.parse(argv or ["--help"])
    raise UsageError([f"no command given. {TRY_HELP}"])


def _run(command: Command, argv: Sequence[str]) -> int:
    code: int = importlib.import_module(command.module).run(argv)
    return code


def _become(module: str, argv: Sequence[str]) -> NoReturn:
    """Run the program in this process's place, so that signals and the exit code are its own."""
    sys.stdout.flush()
    # -P: not a package of that name that happens to lie in the user's folder.
    safe = [] if version() == NOT_INSTALLED else ["-P"]
    os.execv(sys.executable, [sys.executable, *safe, "-m", module, *argv])  # noqa: S606


def _top_parser() -> Parser:
    commands = "\n".join(f"  {name:<7} {command.sentence}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="snugfit",
        usage="snugfit COMMAND [options]",
        description="Fits a language model into the memory you have and serves it over the OpenAI API.",
        epilog=f"commands:\n{commands}\n\n'snugfit COMMAND --help' lists the options of a command.",
        formatter_class=RawDescriptionHelpFormatter,
    )
    return parser


def _refuse(err: LoaderError | UsageError) -> int:
    """Say what is wrong in plain words; the traceback only for someone who asked for it."""
    for problem in err.problems if isinstance(err, UsageError) else [str(err)]:
        print(f"snugfit: error: {problem}", file=sys.stderr)
    if logging.getLogger("service").isEnabledFor(logging.DEBUG):
        traceback.print_exception(err)
    return err.exit_code
