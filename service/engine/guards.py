"""What the engine refuses: a pool at the start, a request at the door."""

from __future__ import annotations

from service.engine.rows import StepRunner
from service.engine.types import Request, RequestTooLong, UnknownToken


def check_pool(runner: StepRunner) -> None:
    """Raises ValueError when the pool does not hold one whole context: nobody could make room for a request
    that is alone and needs more."""
    tokens = runner.layout.block_tokens
    for number, group in enumerate(runner.layout.groups):
        least = group.blocks_for(runner.context, runner.chunk_tokens, tokens)
        if group.blocks < least:
            raise ValueError(
                f"group {number} of the KV pool has {group.blocks} blocks of {tokens} tokens, and a context "
                f"of {runner.context} tokens, read {runner.chunk_tokens} at a time, needs {least}"
            )


def check_request(request: Request, runner: StepRunner) -> None:
    """Raises RequestTooLong or UnknownToken; ValueError for what the door should not have let in."""
    ids = request.prompt_ids
    if len(ids) >= runner.context:
        raise RequestTooLong(len(ids), runner.context)
    if not ids or request.params.max_tokens < 1:
        raise ValueError(f"request {request.id} has no prompt, or asks for no token")
    for token_id in (min(ids), max(ids)):
        if not 0 <= token_id < runner.vocab:
            raise UnknownToken(token_id, runner.vocab)
