"""The conversation: turns, commands, and what is shown of an answer while it comes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from service.openai_client import ChatApi, ServerError

HELP = """\
/reset         forget the conversation
/system TEXT   set the system message and forget the conversation; without TEXT: none
/exit          leave (also Ctrl-D)
Ctrl-C stops an answer."""
DIM, PLAIN = "\x1b[2m", "\x1b[0m"


class Chat:
    """Reads turns from stdin until it ends, and writes the answers to stdout as they come."""

    def __init__(
        self, api: ChatApi, model: str, options: Mapping[str, Any], system: str | None = None
    ) -> None:
        self._api = api
        self._model = model
        self._options = dict(options)
        self._messages: list[dict[str, str]] = []
        self._tty = sys.stdin.isatty() and sys.stdout.isatty()
        self._forget(system)

    def run(self) -> int:
        """The exit code: 0, or that of the first error when nobody sits at a terminal to read it."""
        if self._tty:
            self._greet()
        while (turn := self._read()) is not None:
            if turn in ("/exit", "/quit"):
                break
            try:
                self._take(turn)
            except ServerError as err:
                print(f"snugfit: error: {err}", file=sys.stderr)
                if not self._tty:
                    return err.exit_code
        return 0

    def _greet(self) -> None:
        with contextlib.suppress(ImportError):  # line editing and history; Windows' console has its own
            import readline  # noqa: F401
        print(f"{self._model} at {self._api.url}. /help lists the commands.")

    def _read(self) -> str | None:
        """The next line that is not empty; None at the end of the input."""
        while True:
            try:
                line = input("\n> " if self._tty else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._tty:
                    raise
                print("\n(/exit or Ctrl-D leaves)")
                continue
            if line.strip():
                return _without_surrogates(line.strip())

    def _take(self, turn: str) -> None:
        command, _, rest = turn.partition(" ")
        if command == "/reset":
            self._forget(self._system)
        elif command == "/system":
            self._forget(rest.strip() or None)
        elif command == "/help":
            print(HELP)
        else:
            self._ask(turn)

    def _forget(self, system: str | None) -> None:
        self._system = system
        self._messages = [{"role": "system", "content": system}] if system else []

    def _ask(self, turn: str) -> None:
        """One turn. It is remembered with what was said of the answer; not at all when nothing was."""
        messages = [*self._messages, {"role": "user", "content": turn}]
        answer = Answer(self._tty)
        try:
            answer.show(self._api, {"model": self._model, "messages": messages, **self._options})
        finally:
            if answer.text:
                self._messages = [*messages, {"role": "assistant", "content": answer.text}]


class Answer:
    """One answer, shown while it comes."""

    def __init__(self, tty: bool) -> None:
        self.text = ""
        self._tty = tty

    def show(self, api: ChatApi, body: dict[str, Any]) -> None:
        """Stream the answer to stdout. Ctrl-C on a terminal closes the request and keeps what was said."""
        started, tokens, note = time.monotonic(), None, ""
        with contextlib.closing(api.stream(body)) as pieces:
            try:
                for piece in pieces:
                    self._write(piece.text)
                    tokens = piece.completion_tokens or tokens
                    note = "cut at the token limit" if piece.finish_reason == "length" else note
            except KeyboardInterrupt:
                if not self._tty:
                    raise
                note = "stopped"
            finally:
                print(flush=True)
        if self._tty:
            self._tell(tokens, time.monotonic() - started, note)

    def _write(self, text: str) -> None:
        self.text += text
        print(text, end="", flush=True)

    def _tell(self, tokens: int | None, seconds: float, note: str) -> None:
        speed = f"{tokens} tokens in {seconds:.1f} s" if tokens else ""
        if said := ", ".join(filter(None, (speed, note))):
            print(f"{DIM}({said}){PLAIN}")


def _without_surrogates(text: str) -> str:
    """Bytes that the terminal's encoding could not read are lone surrogates, which JSON cannot carry."""
    return text.encode("utf-8", errors="replace").decode("utf-8")
