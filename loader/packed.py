"""How many bytes one step of a batch holds at its worst moment, weights, KV pool and logits aside.

The step is the batching runner's: new tokens of several sequences packed into [1, tokens], no attention
masks, no cache in the model. Keys and values go into the pool, and attention reads them from there. The worst
attention is the one in plain torch, sequence by sequence; kernels that read blocks where they lie need less.
On the CPU there may be kernels for the rest, which keep what they work in. So this is an upper bound, where
`Forward` is a close estimate.
"""

from __future__ import annotations

from dataclasses import dataclass

from loader.activations import FLOAT32, INT64, MASK_ALIGNMENT, Forward
from loader.families import SLIDING

INT32 = 4
BFLOAT16 = 2
GATED = 3  # `Family.mlp_tensors` of gate, up and down, each a matrix of its own
# Queries for which that attention makes a mask or scores at once, so that these stay small for a long chunk.
QUERIES_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class PackedForward(Forward):
    """`tokens` new tokens of `rows` sequences, each with at most `total` when the step is done."""

    rows: int = 1
    block_tokens: int = 32
    paged: bool = False  # attention reads keys and values where they are

    def _trunk(self) -> int:
        """The embeddings, cos and sin, and the step's own tensors."""
        tables = 2 * self.shape.rotary_dim * self.shape.rope_tables
        return self._wide(self.shape.hidden + tables) + self._step_tensors()

    def _step_tensors(self) -> int:
        """service/engine/batch.py: ids, positions, slots in each group; lengths and block tables of rows."""
        groups = len(set(self.shape.layer_kinds))
        blocks = -(-self.total // self.block_tokens)
        longs = (2 + groups) * self.tokens + self.rows
        ints = 4 * self.rows + 2 + groups * self.rows * blocks
        return longs * INT64 + ints * INT32

    def _scores(self, kind: str) -> int:
        """All projections stay, because the model keeps no cache that could take keys and values over."""
        return self._projections + (0 if self.paged else self._alone(kind) + self.scratch)

    def _output(self) -> int:
        return self._projections + self._wide(self.shape.hidden)

    @property
    def _projections(self) -> int:
        """Query, keys, values and output, and what they were made of."""
        query, kv = self.shape.query_width, self.shape.kv_width
        # On the CPU q, k and v may be views of one product, which lives as long as any of them.
        fused = 0 if self.gpu else query + 2 * kv
        return self._wide(2 * (query + kv) + max(self._projections_width, fused))

    def _alone(self, kind: str) -> int:
        """What attention in plain torch (service/engine/backends.py) holds for one sequence at a time.

        Keys and values out of their blocks; and of a piece of its queries the mask, scores and output.
        """
        shape, piece = self.shape, min(self._new, QUERIES_AT_ONCE)
        seen_by_all, seen = (self._seen_by(new, kind) for new in (self._new, piece))
        gathered = 2 * shape.kv_width * (seen_by_all + 2 * self.block_tokens) * self.dtype_bytes
        # The output, and again in the order of the batch; keys whose heads are not in their last places.
        own = 2 * piece * shape.query_width * self.dtype_bytes + self._wide(shape.kv_width)
        cells = piece * seen
        masks = 2 * cells + seen * INT64
        if self._family.eager:
            # Scores, float32 copies of them before and after softmax; keys or values of every query head.
            repeated = shape.query_width * seen * self.dtype_bytes
            scores = cells * shape.heads * (self.dtype_bytes + 2 * FLOAT32)
            return gathered + own + masks + repeated + scores
        floats = piece * (seen + (MASK_ALIGNMENT + seen if self.gpu else 0)) * self.dtype_bytes
        return gathered + own + masks + floats + piece * shape.heads * FLOAT32

    @property
    def _new(self) -> int:
        """Tokens of one sequence."""
        return min(self.tokens, self.total)

    def _seen_by(self, new: int, kind: str) -> int:
        """Tokens that the last `new` of a full context see, themselves included."""
        window = self.shape.window if kind == SLIDING else None
        return min(self.total, window - 1 + new) if window else self.total

    def _dense_mlp(self) -> int:
        """As in `Forward`, but no layer holds its attention's weights; a fused gate and up is a view.

        On the CPU one that is gate, up and down is one call, whose scratch is less than torch's tensors.
        """
        tensors = self._family.mlp_tensors
        alive = tensors if self.gpu else max(tensors, 4)
        wide = self._wide(3 * self.shape.hidden + alive * self.shape.intermediate)
        return wide if tensors == GATED else wide + self.scratch

    def _expert_mlp(self) -> int:
        return Forward._expert_mlp(self) + self.scratch  # `super()` knows no class with slots of a dataclass

    @property
    def scratch(self) -> int:
        """What kernels on the CPU keep between calls (service/engine/cpu/scratch.py): the input of a module,
        in float32 where the processor multiplies nothing else, and what lies between an MLP's matrices."""
        if self.gpu or self.dtype_bytes != BFLOAT16:
            return 0
        inner = self.shape.intermediate if self.shape.dense_layers else 0
        return self.tokens * (max(self.shape.hidden, self.shape.query_width) + inner) * FLOAT32
