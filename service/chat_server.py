"""A server of one's own: `snugfit chat` starts `snugfit serve` as a child and stops it at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console

from service.openai_client import ChatApi, ServerError
from service.show import size
from service.sources import env_name, flag_name

HOST = "127.0.0.1"
PACKAGES = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1
STOP_SECONDS = 10
EXIT_TERMINATED = 143
ENDING_SIGNALS = ("SIGTERM", "SIGHUP")  # SIGHUP: the terminal was closed; Windows has none


class OwnServer:
    """`snugfit serve` on a free port, for as long as the context lasts. Its complaints go to our stderr."""

    def __init__(self, flags: Mapping[str, Any], config: Path | None, api_key: str | None) -> None:
        self._flags = {field: str(value) for field, value in flags.items() if field != "api_key"}
        if config is not None:
            self._flags["config"] = str(config)
        self._api_key = api_key
        self._port = _free_port()
        self.url = f"http://{HOST}:{self._port}"

    def __enter__(self) -> OwnServer:
        for name in ENDING_SIGNALS:
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), _leave)
        self._process = subprocess.Popen(
            self._command(), env=self._environment(), stdout=subprocess.DEVNULL, **_own_group()
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_until_ready(self, api: ChatApi) -> None:
        """Return when the model is loaded, showing how far it is; ServerError when the child ends before."""
        console = Console(stderr=True)
        with console.status("starting") if console.is_terminal else contextlib.nullcontext() as status:
            while not (answer := api.readiness())[0]:
                if (code := self._process.poll()) is not None:
                    raise ServerError(f"the server that was started ended with exit code {code}", code or 1)
                if status:
                    status.update(progress(answer[1]))
                time.sleep(POLL_SECONDS)

    def _command(self) -> list[str]:
        command = [sys.executable, "-P", "-m", "service", "serve"]
        for field, value in self._flags.items():
            command += [value] if field == "model" else [flag_name(field), value]
        return [*command, "--host", HOST, "--port", str(self._port), "--log-level", "warning"]

    def _environment(self) -> dict[str, str]:
        """The key goes this way because a flag would stand in the process list.

        With -P and our own folder in PYTHONPATH, a folder `service` where the user stands is not imported.
        """
        key = {env_name("api_key"): self._api_key} if self._api_key else {}
        paths = [str(PACKAGES), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {**os.environ, **key, "PYTHONPATH": os.pathsep.join(paths)}


def progress(body: Mapping[str, Any]) -> str:
    """/ready's body in a few words: "reading weights, 3.20 GB of 15.23 GB"."""
    state = body.get("progress") or {}
    phase = str(state.get("phase") or body.get("status") or "starting")
    if not state.get("total_bytes"):
        return phase
    return f"{phase}, {size(state['done_bytes'])} of {size(state['total_bytes'])}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def _own_group() -> dict[str, Any]:
    """Popen's arguments for a child that the Ctrl-C of our terminal does not reach."""
    if sys.platform == "win32":
        return {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    return {"start_new_session": True}


def _leave(_number: int, _frame: FrameType | None) -> None:
    """Unwind, so that the child is stopped."""
    sys.exit(EXIT_TERMINATED)
