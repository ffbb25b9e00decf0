"""A real proxy before several replicas, on 127.0.0.1 and a free port: nginx or HAProxy, set up for streams.

Both pass on each piece as it comes, wait long for the first one, and try another replica when one has refused
a request or broken off before it had answered anything. Which replicas there are can be changed while they
run, as an ingress controller or kube-proxy does.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

from benchmarks.port import free_port

START_SECONDS = STOP_SECONDS = 10
PLACES = 8  # of replicas in HAProxy's table
TEMPORARY = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")

NGINX = """\
{user}daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 1024; }}
http {{
    access_log off;
{temporary}
    client_max_body_size 2m;
    client_body_buffer_size 2m;
    upstream replicas {{
        {balance}
{servers}
        keepalive 32;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://replicas;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
            proxy_connect_timeout 1s;
            proxy_read_timeout 600s;
            proxy_send_timeout 600s;
            # POST too: a request without a byte of an answer may be asked again, it changes nothing.
            proxy_next_upstream {retry};
        }}
    }}
}}
"""
NGINX_RETRY = "error timeout http_503 non_idempotent"
NGINX_BALANCE = {
    "even": "",  # one after the other
    "random": "random;",
    "least": "least_conn;",
    "conversation": "hash $http_x_conversation consistent;",
}

HAPROXY = """\
global
    stats socket {folder}/haproxy.sock mode 600 level admin
    maxconn 2000
defaults
    mode {mode}
    timeout connect 1s
    timeout client 600s
    timeout server 600s
frontend clients
    bind 127.0.0.1:{port}
    default_backend replicas
backend replicas
    balance roundrobin
    # Without it a piece of a stream may wait 200 ms for the next one.
    option http-no-delay
{checks}{retries}{servers}
"""
HAPROXY_CHECKS = """\
    option httpchk GET /ready
    http-check expect status 200
    default-server check inter 500ms fall 1 rise 1
"""
HAPROXY_RETRIES = """\
    # Only a request that is there as a whole can be asked again, and clients send its body after its head.
    option http-buffer-request
    # So many, because the next one in turn may be the one that has just refused: HAProxy does not remember.
    retries 8
    option redispatch 1
    retry-on conn-failure empty-response 503
"""


class NotInstalled(Exception):
    """The program is not there; the message says how it is installed."""


class Proxy(Protocol):
    @property
    def url(self) -> str: ...

    def tell(self, ports: Sequence[int]) -> None:
        """These replicas and no others get new requests; what runs elsewhere goes on."""
        ...


class _Running:
    """A program that listens on a free port of its own from `with` on, and ends with it."""

    def __init__(self, program: str, package: str, folder: Path) -> None:
        """Raises NotInstalled."""
        found = shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
        if found is None:
            raise NotInstalled(f"{program} is not installed: apt-get install {package}")
        self._program, self._folder, self.port = found, folder, free_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self, *arguments: str) -> None:
        self._log = (self._folder / "output.log").open("w")
        self._process = subprocess.Popen(
            [self._program, *arguments], stdout=self._log, stderr=self._log, start_new_session=True
        )
        try:
            self._wait_until_it_listens()
        except BaseException:
            self._stop()
            raise

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not _listens(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(
                    f"{self._program} did not start: {(self._folder / 'output.log').read_text()}"
                )
            time.sleep(0.02)

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(STOP_SECONDS)
        self._log.close()


class Nginx(_Running):
    """Told of replicas by a new configuration and SIGHUP, as its ingress controllers do at a change."""

    def __init__(self, folder: Path, ports: Sequence[int], balance: str = "even", retry: bool = True) -> None:
        super().__init__("nginx", "nginx-light", folder)
        self._ports, self._balance, self._retry = ports, balance, retry

    def __enter__(self) -> Nginx:
        self._write(self._ports)
        self.start("-p", str(self._folder), "-c", "nginx.conf", "-e", str(self._folder / "error.log"))
        return self

    def tell(self, ports: Sequence[int]) -> None:
        self._write(ports)
        self.signal(signal.SIGHUP)

    def _write(self, ports: Sequence[int]) -> None:
        text = NGINX.format(
            user="user root;\n" if os.geteuid() == 0 else "",
            folder=self._folder,
            temporary="\n".join(f"    {name}_temp_path {self._folder}/{name};" for name in TEMPORARY),
            balance=NGINX_BALANCE[self._balance],
            servers="\n".join(
                f"        server 127.0.0.1:{port} max_fails=1 fail_timeout=1s;" for port in ports
            ),
            port=self.port,
            retry=NGINX_RETRY if self._retry else "off",
        )
        (self._folder / "nginx.conf").write_text(text)


class Haproxy(_Running):
    """Told of replicas over its socket. `checks`: it also asks each for /ready twice a second, as kubelet
    does for the endpoints of a Service. `mode` "tcp" knows connections and no requests, like kube-proxy."""

    def __init__(
        self,
        folder: Path,
        ports: Sequence[int],
        retry: bool = True,
        mode: str = "http",
        checks: bool = True,
    ) -> None:
        super().__init__("haproxy", "haproxy", folder)
        self._ports, self._mode = list(ports), mode
        self._retries = HAPROXY_RETRIES if retry and mode == "http" else ""
        self._checks = HAPROXY_CHECKS if checks else ""

    def __enter__(self) -> Haproxy:
        text = HAPROXY.format(
            folder=self._folder,
            mode=self._mode,
            port=self.port,
            checks=self._checks,
            retries=self._retries,
            servers="\n".join(map(self._server, range(PLACES))),
        )
        (self._folder / "haproxy.cfg").write_text(text)
        self.start("-db", "-f", str(self._folder / "haproxy.cfg"))
        return self

    def tell(self, ports: Sequence[int]) -> None:
        """A place keeps its replica, so that what runs there is not disturbed."""
        for place, port in enumerate(self._ports):
            if port not in ports:
                self._command(f"set server replicas/s{place} state maint")
        for port in ports:
            if port not in self._ports:
                gone = next((p for p in self._ports if p not in ports), None)
                place = len(self._ports) if gone is None else self._ports.index(gone)
                self._ports[place : place + 1] = [port]
                self._command(f"set server replicas/s{place} addr 127.0.0.1 port {port}")
            self._command(f"set server replicas/s{self._ports.index(port)} state ready")

    def _server(self, place: int) -> str:
        known = place < len(self._ports)
        port, off = (self._ports[place], "") if known else (1, " disabled")
        return f"    server s{place} 127.0.0.1:{port}{off}"

    def _command(self, text: str) -> None:
        with socket.socket(socket.AF_UNIX) as line:
            line.connect(str(self._folder / "haproxy.sock"))
            line.sendall(f"{text}\n".encode())
            said = line.recv(4096).decode().strip()
        if said and "changed" not in said and "no need" not in said:
            raise SystemExit(f"haproxy: {text}: {said}")


def _listens(port: int) -> bool:
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0
