"""`snugfit chat`: a conversation in the terminal with any server that speaks the OpenAI chat API.

On a terminal it prompts, streams, and Ctrl-C stops an answer but not the chat. Without one (a pipe, a file)
every line of stdin is a turn and only the answers are written to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from loader.usage import Parser, UsageError
from service.chat_server import OwnServer
from service.chat_session import Chat
from service.flags import add_flags, typed_flags
from service.openai_client import ChatApi, ServerError
from service.sources import load_settings

DEFAULT_URL = "http://127.0.0.1:8000"


def run(argv: Sequence[str]) -> int:
    """Exit code 0 when the chat was left, 42 or 75 when the server could not answer."""
    parsed = _parser().parse(argv)
    flags = typed_flags(parsed)
    settings = load_settings(flags, parsed.config)
    own = bool(flags.keys() - {"api_key"}) or parsed.config is not None
    if own and parsed.url:
        raise UsageError(
            ["--url is for a server that runs; MODEL, --budget and the like are for one to start"]
        )
    if parsed.url and not parsed.url.startswith(("http://", "https://")):
        raise UsageError(
            [f"--url: {parsed.url!r} is not accepted; accepted: http://HOST:PORT or https://HOST"]
        )
    _speak_utf8()
    key = settings.api_keys[0] if settings.api_keys else None
    own_server = OwnServer(flags, parsed.config, key)
    try:
        with _server(parsed.url, own, own_server, key) as api:
            model = parsed.name or api.first_model()
            return Chat(api, model, _request_options(parsed), parsed.system).run()
    except ServerError as err:
        print(f"snugfit: error: {err}", file=sys.stderr)
        return err.exit_code


def _parser() -> Parser:
    parser = Parser(
        prog="snugfit chat",
        usage="snugfit chat [--url URL] [options]\n       snugfit chat [MODEL] [--budget SIZE] [options]",
        description="Talks to a running server. When none answers, or with MODEL or a budget, "
        "it starts one itself and stops it at the end.",
    )
    talk = parser.add_argument_group("chat")
    talk.add_argument("--url", help=f"Address of the server. [{DEFAULT_URL}]")
    talk.add_argument(
        "--api-key", dest="api_key", default=argparse.SUPPRESS, metavar="KEY", help="Key of the server."
    )
    talk.add_argument(
        "--model", dest="name", metavar="NAME", help="Model to ask for, by the server's name for it."
    )
    talk.add_argument("--system", metavar="TEXT", help="System message.")
    talk.add_argument(
        "--temperature", type=float, metavar="T", help="0 is greedy. Without it: the model's default."
    )
    talk.add_argument("--max-tokens", type=int, metavar="N", help="Longest answer. Without it: what fits.")
    add_flags(parser, ("model", "memory"))
    return parser


def _request_options(parsed: argparse.Namespace) -> dict[str, Any]:
    """What the user set of a request; the server's defaults stand for the rest."""
    options = {"temperature": parsed.temperature, "max_tokens": parsed.max_tokens}
    return {name: value for name, value in options.items() if value is not None}


@contextlib.contextmanager
def _server(url: str | None, own: bool, own_server: OwnServer, key: str | None) -> Iterator[ChatApi]:
    """The API to talk to: the one that runs, or one that is started here and stopped on the way out."""
    if not own:
        with ChatApi(url or DEFAULT_URL, key) as api:
            if url or api.answers():
                yield api
                return
    with own_server as server, ChatApi(server.url, key) as api:
        server.wait_until_ready(api)
        yield api


def _speak_utf8() -> None:
    """Pipes carry UTF-8 on every system; a terminal keeps what Python chose for it."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            stream.reconfigure(encoding="utf-8", errors="replace")
