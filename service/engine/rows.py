"""What crosses between the engine's loop and whatever runs the model. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import Any, Protocol

from loader.kv_layout import KvLayout


@dataclass(frozen=True, slots=True)
class Row:
    """What one sequence puts into one step."""

    ids: Ids[int]  # new token ids, at least one
    start: int  # tokens of the sequence before them; their keys and values are in the pool
    tables: tuple[Ids[int], ...]  # for each group of the layout, the blocks of the sequence in order;
    # token t is in block tables[g][t // block_tokens], at t % block_tokens. A block that every sliding layer
    # has left behind is gone, and stands here as 0.
    sample: bool  # whether logits after the last of `ids` are wanted


def nothing() -> None:
    pass


class StepRunner(Protocol):
    """What the engine needs of `service.engine.runner`. Only the engine's thread calls it."""

    context: int  # tokens of one sequence, at most
    concurrency: int  # rows of one step, at most
    chunk_tokens: int  # ids of one step, at most, of all rows together
    layout: KvLayout
    vocab: int  # ids that it can read are 0 to vocab - 1
    prefix_reuse: bool  # whether full blocks may be found by their tokens, and shared
    one_state: (
        bool  # The cache is the state of one sequence and no blocks: then `concurrency` is 1 and nothing
    )
    # is reused. After an error nobody knows that state: the sequence has to begin again at 0.

    def step(self, rows: Ids[Row], meanwhile: Callable[[], None] = nothing) -> Any:
        """One forward. Logits [rows with `sample`, vocab] in their order, in the model's dtype.

        `meanwhile` is called once, unless an error comes before: when the device, or native code, begins to
        compute for long. Work that it gives to other threads holds up nobody then.

        Raises what `devices.out_of_memory` knows when there is no memory for it. After any error the keys and
        values of the ids in `rows` are undefined, all others are untouched, but for `one_state`.
        """
        ...

    def recover(self) -> None:
        """After an error: free what it left. Raises DeviceLost when the device answers nothing any more."""
        ...

    def close(self) -> None: ...
