"""The frames of a stream. What is the same in every chunk is written once, since a chunk is a token.

Made by hand and not by pydantic, which took a quarter of the time of a token; the fields and their order are
those of OpenAI's CreateChatCompletionStreamResponse.
"""

from __future__ import annotations

from pydantic_core import to_json

from service.api import sse
from service.api.schemas import Logprobs, Usage


class Chunks:
    """Frames with one id, time and model. With `include_usage` each has the key: null but in the last."""

    def __init__(self, id_: str, created: int, model: str, include_usage: bool) -> None:
        about = {"id": id_, "object": "chat.completion.chunk", "created": created, "model": model}
        self._head = sse.DATA + to_json(about)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}' + sse.END if include_usage else b"]}" + sse.END
        self._text_tail = b'},"logprobs":null,"finish_reason":null}' + self._tail

    def role(self, index: int) -> bytes:
        """The first chunk of an answer."""
        return b'%b{"index":%d,"delta":{"role":"assistant","content":""%b' % (
            self._head, index, self._text_tail,
        )  # fmt: skip

    def text(self, index: int, text: str, logprobs: Logprobs | None = None) -> bytes:
        tail = self._text_tail
        if logprobs:
            tail = b'},"logprobs":%b,"finish_reason":null}%b' % (to_json(logprobs), self._tail)
        return b'%b{"index":%d,"delta":{"content":%b%b' % (self._head, index, to_json(text), tail)

    def end(self, index: int, reason: str) -> bytes:
        """The last chunk of an answer."""
        return b'%b{"index":%d,"delta":{},"logprobs":null,"finish_reason":%b}%b' % (
            self._head, index, to_json(reason), self._tail,
        )  # fmt: skip

    def usage(self, usage: Usage) -> bytes:
        """The last chunk of all, if asked for."""
        return b'%b],"usage":%b}%b' % (self._head, usage.model_dump_json().encode(), sse.END)
