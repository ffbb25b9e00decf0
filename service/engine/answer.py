"""From token ids to what a client is shown, and when it ends."""

from __future__ import annotations

from typing import Any

from service.engine.detokenizer import Detokenizer
from service.engine.stop_strings import StopStrings
from service.engine.types import SamplingParams, TokenEvent


class Answer:
    """One request's text so far. `room` is how many tokens its context can still take."""

    def __init__(self, params: SamplingParams, tokenizer: Any, room: int) -> None:
        self._ends = params.stop_token_ids
        self._limit = min(params.max_tokens, room)
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(params.stop)
        self._tokens = 0

    def push(self, token_id: int) -> TokenEvent:
        """Take the token that was chosen. An event with a finish_reason is the last.

        An end-of-text token is counted, since it was generated, and not shown.
        """
        self._tokens += 1
        ended = token_id in self._ends
        text = "" if ended else self._stops.push(self._detokenizer.push(token_id))
        reason = self._reason(ended)
        if reason:
            text += self._rest()
            reason = "stop" if self._stops.found else reason
        return TokenEvent(text, token_id, self._tokens, reason)

    def _reason(self, ended: bool) -> str | None:
        if ended or self._stops.found:
            return "stop"
        return "length" if self._tokens >= self._limit else None

    def _rest(self) -> str:
        """Everything that was held back."""
        return self._stops.push(self._detokenizer.flush()) + self._stops.flush()
