"""Chat messages to token ids, by the model's own Jinja template or one that was given instead of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from loader.errors import BadCheckpoint
from service.prompt.token_text import TokenTexts

Message = Mapping[str, str]

_PROBE = "snugfit-probe"  # stands for an answer; no template writes it by itself


class TemplateRefused(Exception):
    """The template does not take this conversation; the message is its own (`raise_exception`)."""


class NoChatTemplate(BadCheckpoint):
    """The tokenizer has no chat template and none was given."""

    def __init__(self, source: str) -> None:
        super().__init__(
            f"{source}: has no chat template, so it cannot be served as a chat model. "
            "If it is a base model, use its chat version; else give a template: --chat-template FILE."
        )


class BadChatTemplate(BadCheckpoint):
    """The chat template cannot even render a single question."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(f"{source}: its chat template cannot be used: {reason}")


class ChatTemplate:
    """A tokenizer with the template it renders by. `encode` may be called from several threads."""

    def __init__(self, tokenizer: Any, source: str, override: Path | None = None) -> None:
        """Raises NoChatTemplate or BadChatTemplate: a bad template stops the start and not a request."""
        self._tokenizer = tokenizer
        self.tokens = TokenTexts(tokenizer)
        self._text = (
            override.read_text(encoding="utf-8-sig") if override else _own_template(tokenizer, source)
        )
        self._knows_developer = "developer" in self._text
        self._longest_token = max(map(len, tokenizer.get_vocab()))  # characters; of byte-level BPE, bytes
        try:
            # The first call also resets any truncation in tokenizer.json, so that later calls change nothing.
            self._render([{"role": "user", "content": _PROBE}])
        except TemplateRefused as err:
            raise BadChatTemplate(str(override or source), str(err)) from None

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Token ids of the conversation, up to where the answer begins. Raises TemplateRefused.

        `developer` is rendered as `system` where the template does not know it. Where it refuses system
        messages that do not come first, they are joined at the front.
        """
        named = [self._with_known_role(message) for message in messages]
        try:
            return self._render(named)
        except TemplateRefused:
            reordered = _system_first(named)
            if reordered == named:
                raise
        return self._render(reordered)

    def least_tokens(self, messages: Sequence[Message]) -> int:
        """As many tokens as the messages would take if each were the longest of the vocabulary."""
        return sum(len(message["content"]) for message in messages) // self._longest_token

    def end_ids(self) -> frozenset[int]:
        """The special token that the template writes after an answer: <|im_end|>, <|eot_id|> …"""
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
        try:
            text = self._apply(turns, tokenize=False, add_generation_prompt=False)
        except TemplateRefused:
            return frozenset()
        after = text.rpartition(_PROBE)[2].lstrip()
        special = self._tokenizer.added_tokens_decoder.items()
        ends = [
            (token.content, id_)
            for id_, token in special
            if token.special and after.startswith(token.content)
        ]
        return frozenset([max(ends, key=lambda end: len(end[0]))[1]] if ends else [])

    def _with_known_role(self, message: Message) -> Message:
        if message["role"] == "developer" and not self._knows_developer:
            return {**message, "role": "system"}
        return message

    def _render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(self._apply(messages, tokenize=True, return_dict=False, add_generation_prompt=True))

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=self._text, **options
            )
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as err:
            # Whatever a template does wrong (adding None to a string, say) is about these messages.
            raise TemplateRefused(str(err) or type(err).__name__) from err


def _own_template(tokenizer: Any, source: str) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        raise NoChatTemplate(source) from None


def _system_first(messages: Sequence[Message]) -> list[Message]:
    """All system messages joined into one at the front, the others in their order."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *others] if system else others
