"""From token ids to what a client is shown; ends it at a stop string."""

from __future__ import annotations

from typing import Any

from service.engine.channel import Chosen
from service.engine.detokenizer import Detokenizer
from service.engine.stop_strings import StopStrings
from service.engine.types import SamplingParams, TokenEvent


class Answer:
    """One request's text so far. Works on the client's event loop, beside the engine's next step."""

    def __init__(self, params: SamplingParams, tokenizer: Any) -> None:
        self._min_tokens = params.min_tokens
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopStrings(params.stop)
        self._tokens = 0

    @property
    def stopped(self) -> bool:
        """At a stop string, which the engine does not know of: it goes on until it is told."""
        return self._stops.found

    def push(self, chosen: Chosen) -> TokenEvent:
        """Take the next token. An event with a finish_reason is the last, whatever the engine still sends.

        An end-of-text token is counted, since it was generated, and not shown. The first `min_tokens` tokens
        complete no stop string, as in vLLM.
        """
        self._tokens += 1
        ended = chosen.finish_reason == "stop"
        text = "" if ended else self._show(self._detokenizer.push(chosen.token_id))
        reason = "stop" if self.stopped else chosen.finish_reason
        if reason:
            text += self._show(self._detokenizer.flush()) + self._stops.flush()
            reason = "stop" if self.stopped else reason
        about = chosen.logprobs, chosen.cached_tokens, chosen.queued_s
        return TokenEvent(text, chosen.token_id, self._tokens, reason, *about)

    def _show(self, text: str) -> str:
        return self._stops.push(text, may_end=self._tokens > self._min_tokens)
