"""How many bytes one forward of a prompt chunk holds at its worst moment, weights and KV cache aside.

The forward is the runner's: batch 1, sdpa attention, cache views instead of concatenation, logits for the
last token only. Every line below is a moment of transformers 5.23's modeling code and the tensors that Python
frames keep alive then; a test holds the sum against a trace of the real classes. Widths are elements per
token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loader.families import FULL, LINEAR, SLIDING, Family, family_of
from loader.shape import Shape

FLOAT32 = 4
INT64 = 8
# Fused kernels take grouped KV heads up to this size; above it transformers repeats them (sdpa_attention.py).
GROUPED_HEAD_DIM = 256
# CUDA's memory-efficient attention copies a mask whose rows are not multiples of this many elements.
MASK_ALIGNMENT = 8
# An unlisted family: what nearly every family does, and a quarter more.
ESTIMATE_NUMERATOR, ESTIMATE_DENOMINATOR = 5, 4


@dataclass(frozen=True, slots=True)
class Forward:
    """`tokens` new tokens, after which the sequence has `total`; `gpu` adds what only CUDA's kernels copy."""

    shape: Shape
    dtype_bytes: int
    tokens: int
    total: int
    gpu: bool = False

    def peak_bytes(self) -> int:
        """The widest moment of any layer, with what lives through all of them."""
        peak = self._trunk() + max(self._moments())
        if self.shape.exact:
            return peak
        return peak * ESTIMATE_NUMERATOR // ESTIMATE_DENOMINATOR

    def _moments(self) -> Iterator[int]:
        yield self._norm()
        for kind in set(self.shape.layer_kinds):
            yield self._linear() if kind == LINEAR else self._attention(kind)
        if self.shape.dense_layers:
            yield self._dense_mlp()
        if self.shape.experts:
            yield self._expert_mlp()

    # What lives from the first layer to the last

    def _trunk(self) -> int:
        """The embeddings, cos and sin, positions as int64, and the masks."""
        tables = 2 * self.shape.rotary_dim * self.shape.rope_tables
        return self._wide(self.shape.hidden + tables) + self.tokens * INT64 + self._masks()

    def _masks(self) -> int:
        element = self.dtype_bytes if self._family.eager else 1
        kinds = {FULL, SLIDING} & set(self.shape.layer_kinds)
        return sum(self.tokens * self._seen(kind) * element for kind in kinds if self._masked(kind))

    def _masked(self, kind: str) -> bool:
        """masking_utils.py makes no mask that sdpa's is_causal expresses, such as the first chunk's."""
        if self._family.eager:
            return True
        starts_here = self.total <= self.tokens
        beyond_window = kind == SLIDING and self._seen(kind) >= (self.shape.window or 0)
        return self.tokens > 1 and (not starts_here or beyond_window)

    def _seen(self, kind: str) -> int:
        """Tokens whose keys and values a layer reads."""
        past = self.total - self.tokens
        if kind == SLIDING and self.shape.window:
            past = min(past, self.shape.window - 1)
        return past + self.tokens

    # Moments

    def _norm(self) -> int:
        """RMSNorm holds a float32 copy and one product; input and residual live beside it."""
        hidden = self.shape.hidden
        extra = self._wide(hidden) if self._family.layer_norm else self.tokens * hidden * 2 * FLOAT32
        return self._wide(2 * hidden) + extra

    def _attention(self, kind: str) -> int:
        """The layer's input and its norm live through all of it."""
        widest = max(self._rotary(), self._qk_norm(), self._scores(kind), self._output())
        return self._wide(2 * self.shape.hidden) + widest

    def _rotary(self) -> int:
        """x * cos, rotate_half(x) and that times sin, beside all three projections; q, then k."""
        query, kv = self.shape.query_width, self.shape.kv_width
        turned_query = self.shape.heads * self.shape.rotary_dim
        turned_kv = self.shape.kv_heads * self.shape.rotary_dim
        temporary = max(3 * turned_query, query + 3 * turned_kv)
        if self.shape.rotary_dim < self.shape.head_dim:
            temporary = max(temporary, turned_query + turned_kv + query + kv)
        return self._wide(query + 2 * kv + temporary)

    def _qk_norm(self) -> int:
        if not self._family.qk_norm:
            return 0
        query, kv = self.shape.query_width, self.shape.kv_width
        held = query if self._family.qk_norm == "each" else query + 2 * kv
        variance = 2 * self.shape.heads
        return self._wide(held) + self.tokens * (2 * query + variance) * FLOAT32

    def _scores(self, kind: str) -> int:
        """Query and output, KV heads repeated where the kernel cannot group them, and the mask as floats."""
        own = self._wide(2 * self.shape.query_width + self._projections_width) + self._repeated(kind)
        cells = self.tokens * self._seen(kind)
        if self._family.eager:
            # Scores, then softmax's float32 input (a copy, unless they are float32) and output, for every
            # head.
            copy = 0 if self.dtype_bytes == FLOAT32 else FLOAT32
            return (
                own
                - self._wide(self.shape.query_width)
                + cells * self.shape.heads * (self.dtype_bytes + copy + FLOAT32)
            )
        during = self.tokens * self.shape.heads * FLOAT32 + (
            self._float_mask(kind) if self._masked(kind) else 0
        )
        # A query that torch.cat made is in another memory order, so the output is copied into the usual one.
        after = self._wide(self.shape.query_width) if self._projections_width else 0
        return own + max(during, after)

    def _float_mask(self, kind: str) -> int:
        seen = self._seen(kind)
        padded = seen + MASK_ALIGNMENT - seen % MASK_ALIGNMENT if self.gpu else 0
        return self.tokens * (seen + padded) * self.dtype_bytes

    def _repeated(self, kind: str) -> int:
        """Keys and values of all heads, for every token seen (repeat_kv)."""
        grouped = 1 < self.shape.kv_heads < self.shape.heads  # a single KV head is expanded without a copy
        needed = self._family.eager or self._masked(kind) or self.shape.head_dim > GROUPED_HEAD_DIM
        return 2 * self.shape.query_width * self._seen(kind) * self.dtype_bytes if grouped and needed else 0

    def _output(self) -> int:
        return self._wide(2 * self.shape.query_width + self._projections_width + self.shape.hidden)

    def _dense_mlp(self) -> int:
        """Input, residual and norm (with a parallel block: input, norm and attention's output)."""
        wide = self._wide(3 * self.shape.hidden + self._family.mlp_tensors * self.shape.intermediate)
        if not self._family.eager:
            return wide
        seen = max(self._seen(kind) for kind in self.shape.layer_kinds)
        return (
            wide + self.tokens * seen * self.shape.heads * self.dtype_bytes
        )  # the layer holds attention's weights

    def _expert_mlp(self) -> int:
        """grouped_mm_experts_forward: every token has a row for each expert that it is routed to."""
        hidden, inner = self.shape.hidden, self.shape.expert_intermediate
        rows = self.tokens * self.shape.experts_per_token
        # Gathered input, gate_up, act(gate) and the product; later input, output, weighted and put back in
        # order.
        weighted = FLOAT32 if self._family.float_routing else self.dtype_bytes
        widest = max((hidden + 4 * inner) * self.dtype_bytes, 2 * hidden * (self.dtype_bytes + weighted))
        # Four int64 indices and a float32 copy for the sort, routing weights in float32 and in the dtype.
        indices = 4 * INT64 + 2 * FLOAT32 + self.dtype_bytes
        router = self._wide(self.shape.experts)
        return self._wide(3 * hidden) + rows * (widest + indices) + router

    def _linear(self) -> int:
        return self._delta_rule() if self.shape.linear_width else self._convolution()

    def _delta_rule(self) -> int:
        """torch_chunk_gated_delta_rule: twelve float32 tensors of its values' width, and the projections."""
        width = self.shape.linear_width
        return self._wide(2 * self.shape.hidden + 6 * width) + self.tokens * 12 * width * FLOAT32

    def _convolution(self) -> int:
        """Lfm2ShortConv: input and norm; B, C and x in one; the convolved, times C, and its copy in rows."""
        return self._wide((2 + 3 + 3) * self.shape.hidden)

    # Helpers

    @property
    def _family(self) -> Family:
        return family_of(self.shape.family)

    @property
    def _projections_width(self) -> int:
        """What stays after rotary: a fused projection, or q and k when parts of them are still views."""
        query, kv = self.shape.query_width, self.shape.kv_width
        if self._family.fused_qkv:
            return query + 2 * kv
        if self.shape.rotary_dim == self.shape.head_dim:
            return 0
        return query + kv + (self.shape.heads + self.shape.kv_heads) * self.shape.rotary_dim

    def _wide(self, width: int) -> int:
        """Bytes of a tensor with `width` elements for each new token."""
        return self.tokens * width * self.dtype_bytes
