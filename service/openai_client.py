"""The few calls that `snugfit chat` makes to a server, over httpx."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from types import TracebackType
from typing import Any

import httpx

from loader.errors import EXIT_BAD_INPUT, EXIT_RETRY

# A long prompt on a slow machine is silent for minutes; servers that send SSE comments are not.
TIMEOUT = httpx.Timeout(600, connect=5)
PROBE_TIMEOUT_S = 2


class ServerError(Exception):
    """The server cannot be reached, or answered with an error; in its own words where it has any."""

    def __init__(self, message: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message)


@dataclass(frozen=True)
class Piece:
    """A piece of an answer. The last ones carry the reason it ended and the tokens it took."""

    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None


class ChatApi:
    """One server. Use as a context manager; `url` may end in /v1 or not."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # A proxy from the environment cannot reach this machine's own loopback.
        self._http = httpx.Client(
            base_url=self.url, headers=headers, timeout=TIMEOUT, trust_env=not is_loopback(self.url)
        )

    def __enter__(self) -> ChatApi:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def answers(self) -> bool:
        """Whether a server listens at all."""
        try:
            self._http.get("/health", timeout=PROBE_TIMEOUT_S)
        except httpx.TransportError:
            return False
        return True

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        """Whether /ready is 200, and its body; (False, {}) while nothing listens yet."""
        try:
            response = self._http.get("/ready", timeout=PROBE_TIMEOUT_S)
        except httpx.TransportError:
            return False, {}
        return response.status_code == httpx.codes.OK, _object(response.content)

    def first_model(self) -> str:
        """The first model of /v1/models. Raises ServerError."""
        try:
            response = self._http.get("/v1/models")
        except httpx.TransportError as err:
            raise self._unreachable(err) from None
        if response.is_error:
            raise _refusal(response)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise ServerError(
                f"{self.url} has no list of models: is it an OpenAI API?", EXIT_BAD_INPUT
            ) from None

    def stream(self, body: dict[str, Any]) -> Generator[Piece, None, None]:
        """Post a chat completion and yield its pieces as they come. Closing the generator ends it."""
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    response.read()
                    raise _refusal(response)
                yield from _pieces(response)
        except httpx.TransportError as err:
            raise self._unreachable(err) from None

    def _unreachable(self, err: httpx.TransportError) -> ServerError:
        reason = str(err) or type(err).__name__
        return ServerError(
            f"{self.url}: {reason}. Is the server running? Start one: snugfit serve", EXIT_RETRY
        )


def is_loopback(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def sse_data(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The data of each server-sent event, whatever the sizes of the chunks it comes in.

    Lines end in \\n or \\r\\n only: httpx's own iter_lines also breaks at U+2028 inside of a JSON string.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[len(b"data:") :].strip()


def _pieces(response: httpx.Response) -> Iterator[Piece]:
    for data in sse_data(response.iter_bytes()):
        if data == b"[DONE]":
            return
        chunk = _object(data)
        if "error" in chunk:
            raise ServerError(_message(chunk) or data.decode(errors="replace"), EXIT_RETRY)
        yield _piece(chunk)
    raise ServerError("the server closed the stream before the answer was complete", EXIT_RETRY)


def _piece(chunk: dict[str, Any]) -> Piece:
    choice = (chunk.get("choices") or [{}])[0]
    tokens = (chunk.get("usage") or {}).get("completion_tokens")
    return Piece((choice.get("delta") or {}).get("content") or "", choice.get("finish_reason"), tokens)


def _refusal(response: httpx.Response) -> ServerError:
    """An error response in words. 429 and 5xx are worth another try, the rest are not."""
    words = _message(_object(response.content)) or response.text[:200].strip() or response.reason_phrase
    retry = response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error
    after = f" (try again in {seconds} s)" if (seconds := response.headers.get("retry-after")) else ""
    return ServerError(f"{response.status_code}: {words}{after}", EXIT_RETRY if retry else EXIT_BAD_INPUT)


def _message(body: dict[str, Any]) -> str:
    """OpenAI's `error.message`, or FastAPI's `detail`."""
    error = body.get("error")
    return str(error.get("message", "") if isinstance(error, dict) else error or body.get("detail") or "")


def _object(data: bytes) -> dict[str, Any]:
    """JSON that must be an object; {} where it is not."""
    try:
        parsed = json.loads(data)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
