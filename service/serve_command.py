"""`snugfit serve`: what can be refused is refused before anything heavy is imported; then it serves."""

from __future__ import annotations

import atexit
import errno
import gc
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from loader.errors import BudgetExceeded
from loader.plan import Plan
from loader.usage import Parser, UsageError
from service import logs
from service.flags import add_flags, typed_flags
from service.misfit import retry_command
from service.planning import make_plan_for, served_name
from service.settings import Settings
from service.show import print_misfit, print_plan
from service.sources import load_settings

if TYPE_CHECKING:
    from service.tracing import Tracing

BACKLOG = 2048
# GNU OpenMP reads this when torch is imported. Its threads wait for each other by spinning; by default for
# tens of milliseconds, which under other load keeps the core from whom they wait for. A tenth of this costs a
# quarter of the tokens at 16 streams.
SHORTER_SPINS = "GOMP_SPINCOUNT", "100000"
SOCKET_REASONS = {
    errno.EADDRINUSE: "is taken: stop what listens there, or choose another with --port (0: any free one)",
    errno.EACCES: "may not be opened by this user: choose a port above 1023 with --port",
    errno.EADDRNOTAVAIL: "is no address of this machine: choose one with --host",
}

log = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> int:
    """Plan, print the plan, and serve until a signal. The exit code of the server."""
    parsed = _parser().parse(argv)
    settings = load_settings(typed_flags(parsed), parsed.config)
    logs.to_stderr(settings.log_level, settings.log_format)
    tracing = _tracing(settings)
    with listen(settings.host, settings.port) as listener:
        try:
            plan = make_plan_for(settings)
        except BudgetExceeded as err:
            print_misfit(err, retry_command("serve", argv, err), Console(stderr=True))
            raise
        _tell_plan(settings, plan)
        _tell_address(settings, listener)
        os.environ.setdefault(*SHORTER_SPINS)
        # Or the interpreter's last collections go through all of torch, for 2 s at the end of the process.
        atexit.register(gc.freeze)
        from service.server import run as serve

        return serve(settings, plan, listener, tracing)


def _parser() -> Parser:
    parser = Parser(
        prog="snugfit serve",
        usage="snugfit serve [MODEL] [--budget SIZE] [options]",
        description="Loads a model inside a memory budget and serves it over the OpenAI API. Without MODEL, "
        "the small built-in one. docs/config.md lists every option as flag, variable and TOML key.",
    )
    add_flags(parser)
    return parser


def _tracing(settings: Settings) -> Tracing | None:
    if settings.traces == "off":
        return None
    from service.tracing import begin

    return begin()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is loaded so that a taken port is told at once."""
    try:
        family, *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except socket.gaierror as err:
        raise UsageError([f"--host {host}: {err.strerror}"]) from None
    except OSError as err:
        reason = SOCKET_REASONS.get(err.errno or 0, err.strerror)
        raise UsageError([f"port {port} on {host} {reason}"]) from None


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds the listener."""
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _tell_plan(settings: Settings, plan: Plan) -> None:
    """As a table for a person, or as a line of the log for whoever collects only those."""
    if settings.log_format == "text":
        return print_plan(plan)
    numbers = ("weights_bytes", "offloaded_bytes", "kv_tokens", "context", "concurrency", "chunk_tokens")
    devices = {
        device.device: {"budget_bytes": device.budget_bytes, "peak_bytes": device.peak_bytes}
        for device in plan.devices
    }
    fields = {name: getattr(plan, name) for name in numbers}
    log.info("planned: %s", plan.spec.source, extra={"fields": {"plan": {**fields, "devices": devices}}})


def _tell_address(settings: Settings, listener: socket.socket) -> None:
    url = url_of(listener)
    answers = f"{served_name(settings)} will answer at {url}/v1 when it is loaded ({url}/ready)"
    exposed = not settings.api_keys and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    warning = f"No API key is set: whoever reaches {settings.host}:{settings.port} may use it (--api-key)"
    if settings.log_format == "json":
        log.info("%s", answers)
        if exposed:
            log.warning("%s", warning)
        return
    print(answers)
    if exposed:
        print(warning, file=sys.stderr)
    sys.stdout.flush()
