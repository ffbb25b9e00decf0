"""The service's image: answers, keeps to what it may do, and stops as it is told."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx

from benchmarks.port import free_port
from deployment.images.build import image
from deployment.images.container import SCRATCH, Container
from deployment.images.engine import podman
from deployment.outcome import Failed, need

UID = "10001"
READY_SECONDS = 180
DRAIN_SECONDS = 60
STOP_SECONDS = DRAIN_SECONDS + 30
LONG_ANSWER_TOKENS = 300
# One thread: two would wait for each other on a machine that does other things too.
SETTINGS = {"SNUGFIT_HOST": "127.0.0.1", "SNUGFIT_DRAIN_SECONDS": str(DRAIN_SECONDS), "SNUGFIT_THREADS": "1"}
ABOUT = """
import shutil, torch
from service.engine.cpu.library import kernels
compilers = [name for name in ("cc", "gcc", "g++", "c++", "clang") if shutil.which(name)]
print(torch.__version__, getattr(kernels(), "isa", None), compilers)
"""


class Serving:
    """A container that serves, by `with`; without a model the built-in one."""

    def __init__(self, arguments: Sequence[str] = (), volumes: Sequence[str] = ()) -> None:
        port = free_port()
        self.container = Container(
            image("service"), arguments, {**SETTINGS, "SNUGFIT_PORT": str(port)}, volumes
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=READY_SECONDS)

    def __enter__(self) -> Serving:
        started = time.monotonic()
        self.container.__enter__()
        try:
            wait_until_ready(self.http, self.container.log)
        except BaseException:
            self.__exit__()
            raise
        self.start_seconds = time.monotonic() - started
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.container.__exit__(None, None, None)

    def ask(self, question: str) -> str:
        return ask(self.http, question)


def wait_until_ready(http: httpx.Client, log: Callable[[], str]) -> None:
    """Raises Failed with the log when /ready is not 200 in time."""
    deadline = time.monotonic() + READY_SECONDS
    while _status(http, "/ready") != 200:
        if time.monotonic() > deadline:
            raise Failed(f"not ready after {READY_SECONDS} s: {log()}")
        time.sleep(0.05)


def ask(http: httpx.Client, question: str) -> str:
    """A greedy answer of the only model there is."""
    (model,) = http.get("/v1/models").raise_for_status().json()["data"]
    body = {"model": model["id"], "messages": [{"role": "user", "content": question}], "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


def answers() -> str:
    """A chat, the rights of the process, what is and is not installed, the health check."""
    with Serving() as serving:
        said = serving.ask("Who are you?")
        need("snugfit" in said, f"the answer was {said!r}")
        rights = has_no_rights(serving.container)
        about = serving.container.run("python", "-c", ABOUT).stdout.strip()
        need("+cpu" in about and "None" not in about and about.endswith("[]"), f"inside: {about}")
        _health_check_passes(serving.container)
        start = f"ready after {serving.start_seconds:.1f} s"
        return f"{start}; {said!r}; {rights}; torch, kernels, compilers: {about}"


def has_no_rights(container: Container) -> str:
    """Non-root, no capability, none to be had, and a root file system that is read-only."""
    status = dict(
        line.split(":\t") for line in container.read("/proc/1/status").splitlines() if ":\t" in line
    )
    need(status["Uid"].split() == [UID] * 4, f"runs as uid {status['Uid']}")
    need(int(status["CapEff"], 16) == 0, f"has capabilities {status['CapEff']}")
    need(status["NoNewPrivs"] == "1", "may gain privileges")
    for place, may in (("/", False), ("/opt/snugfit", False), (SCRATCH, True)):
        written = container.run("touch", f"{place}/probe").returncode == 0
        need(written == may, f"{place} {'can' if written else 'cannot'} be written")
    return f"uid {UID}, no capabilities, read-only root"


def _health_check_passes(container: Container) -> None:
    """And fails where nobody listens: a check that cannot fail would be none."""
    kind, *command = json.loads(
        podman("image", "inspect", "--format", "{{json .HealthCheck.Test}}", image("service"))
    )
    need(kind == "CMD", f"the health check is {kind}: it needs a shell")
    checked = container.run(*command)
    need(checked.returncode == 0, f"the health check fails: {checked.stderr[-500:]}")
    nowhere = container.run(*command, environment={"SNUGFIT_PORT": str(free_port())})
    need(nowhere.returncode == 1, f"the health check gives {nowhere.returncode} where nobody listens")


def drains() -> str:
    """SIGTERM in the midst of an answer: it is finished, nothing new is taken, the exit code is 0."""
    with Serving() as serving:
        stream = Stream(serving.http)
        stream.started.wait(READY_SECONDS)
        serving.container.signal("TERM")
        refused = _refused_meanwhile(serving.http)
        code, seconds = serving.container.wait(STOP_SECONDS)
        stream.thread.join()
        need(refused, "a request after SIGTERM was not answered with 503")
        need(stream.whole, f"the answer was cut off after {stream.pieces} pieces")
        need(code == 0, f"exit code {code}: {serving.container.log()}")
        return f"exit code 0 after {seconds:.1f} s; the answer came whole, a new request got 503"


def stops_while_starting() -> str:
    """SIGTERM before Python has a handler for it: process 1 must not swallow it."""
    serving = Serving()
    with serving.container as container:
        container.signal("TERM")
        code, seconds = container.wait(STOP_SECONDS)
    need(code in (0, 143), f"exit code {code}")
    need(seconds < 5, f"it took {seconds:.1f} s")
    return f"exit code {code} after {seconds:.1f} s"


@dataclass
class Stream:
    """A long streamed answer, read on a thread of its own."""

    http: httpx.Client
    pieces: int = 0
    whole: bool = False
    started: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._read)
        self.thread.start()

    def _read(self) -> None:
        body = {
            "model": "snugfit-demo", "messages": [{"role": "user", "content": "What is snugfit?"}],
            "stream": True, "max_tokens": LONG_ANSWER_TOKENS, "ignore_eos": True,
        }  # fmt: skip
        with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            for line in response.iter_lines():
                self.pieces += line.startswith("data: {")
                self.whole = self.whole or line == "data: [DONE]"
                self.started.set()


def _refused_meanwhile(http: httpx.Client) -> bool:
    body = {"model": "snugfit-demo", "messages": [{"role": "user", "content": "Hello"}]}
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        if http.post("/v1/chat/completions", json=body).status_code == 503:
            return True
    return False


def _status(http: httpx.Client, path: str) -> int:
    """0: nobody listens yet."""
    try:
        return http.get(path).status_code
    except httpx.TransportError:
        return 0
