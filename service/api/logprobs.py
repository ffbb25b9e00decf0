"""The engine's logprobs in OpenAI's shape."""

from __future__ import annotations

from collections.abc import Iterable

from service.api.schemas import Logprobs, TokenLogprob, TopLogprob
from service.backend import Tokens
from service.engine.types import TokenEvent

LOWEST = -9999.0  # OpenAI's for a token that is next to impossible; JSON has no infinity


def of_event(event: TokenEvent, tokens: Tokens) -> TokenLogprob | None:
    """The entry of the token that came with the event; None when none was asked for, or no token came."""
    if event.logprobs is None or event.token_id is None:
        return None
    chosen = _one(event.token_id, event.logprobs.chosen, tokens)
    return {**chosen, "top_logprobs": [_one(id_, value, tokens) for id_, value in event.logprobs.top]}


def content(entries: Iterable[TokenLogprob]) -> Logprobs:
    return {"content": list(entries), "refusal": None}


def _one(token_id: int, logprob: float, tokens: Tokens) -> TopLogprob:
    token = tokens.of(token_id)
    return {"token": token.text, "logprob": max(logprob, LOWEST), "bytes": list(token.raw)}
