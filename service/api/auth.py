"""API keys: `Authorization: Bearer KEY`, for everything but the probes."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import InvalidApiKey
from service.api.middleware import PROBES


class ApiKeys:
    """Refuses a request without one of the keys. A browser's preflight (OPTIONS) cannot carry one."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            raise InvalidApiKey
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        if not self._digests or scope["method"] == "OPTIONS" or scope["path"] in PROBES:
            return True
        scheme, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._known(given.strip())

    def _known(self, given: str) -> bool:
        """Digests have one length, and every key is compared, so that the time taken tells nothing."""
        digest = _digest(given.encode("latin-1"))  # as header bytes are decoded
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0


def _digest(key: bytes) -> bytes:
    return sha256(key).digest()
