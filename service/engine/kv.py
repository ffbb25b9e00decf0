"""Which sequence holds which blocks of the KV pool, and which can be used again. Accounting only, no torch.

A block is held (by one sequence or more), idle (nobody holds it, but its content is known and may serve
again) or free. Idle ones count as free: they are evicted when blocks are needed, the longest unused first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as Ids
from hashlib import blake2b

from loader.kv_layout import KvGroup, KvLayout


class Holding:
    """What one sequence holds. Made by `KvPool.holding`; only the pool changes it."""

    __slots__ = ("dropped", "due", "indexed", "keys", "room", "tables")

    tables: tuple[list[int], ...]  # of each group, all of the same length
    dropped: list[int]  # of each group: blocks at the beginning that were given back
    indexed: int  # blocks at the beginning that are full and known to the index
    room: int  # tokens that the tables have a place for
    due: int  # tokens at which `KvPool.wrote` has something to do

    def __init__(self, groups: int) -> None:
        self.keys: list[bytes] = []  # of its full blocks, as far as was needed; they outlive a release
        self.clear(groups)

    def clear(self, groups: int) -> None:
        self.tables = tuple([] for _ in range(groups))
        self.dropped = [0] * groups
        self.indexed = self.room = self.due = 0


class _Group:
    """The blocks of one group of layers."""

    def __init__(self, spec: KvGroup) -> None:
        self.spec = spec
        self.held = [0] * spec.blocks  # how many sequences hold each
        self.keys: list[bytes | None] = [None] * spec.blocks  # under which each is indexed
        self.index: dict[bytes, int] = {}
        self.free = list(range(spec.blocks - 1, -1, -1))
        self.idle: OrderedDict[int, None] = OrderedDict()  # the longest unused first

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def lend(self) -> int:
        """A block for new content. There has to be an available one."""
        if self.free:
            block = self.free.pop()
        else:
            block, _ = self.idle.popitem(last=False)
            key = self.keys[block]
            assert key is not None
            del self.index[key]
            self.keys[block] = None
        self.held[block] = 1
        return block

    def share(self, key: bytes) -> int:
        """The block that is indexed under `key`, for one holder more."""
        block = self.index[key]
        if not self.held[block]:
            del self.idle[block]
        self.held[block] += 1
        return block

    def give_back(self, block: int) -> None:
        """One holder less."""
        self.held[block] -= 1
        if self.held[block]:
            return
        if self.keys[block] is None:
            self.free.append(block)
        else:
            self.idle[block] = None

    def unpublish(self, key: bytes) -> None:
        """Let nobody find what is indexed under `key`, if anything is."""
        block = self.index.pop(key, None)
        if block is None:
            return
        self.keys[block] = None
        if not self.held[block]:
            del self.idle[block]
            self.free.append(block)

    def publish(self, block: int, key: bytes) -> None:
        """Index a full block, unless another one has the same content: then this stays its holder's own."""
        if key not in self.index:
            self.index[key] = block
            self.keys[block] = key


class KvPool:
    """Blocks 0 to `blocks - 1` of each group in `layout`, lent to sequences.

    A sequence's tables grow with `grow`; what a step has written is told with `wrote`. With `prefix_reuse`,
    full blocks can be found by the tokens in and before them, also after their sequence has ended. The key of
    a block is a 256-bit hash of its tokens and of the key before it, so that nobody is given another's
    content. Two sequences that compute the same at the same time keep a block each, and one is indexed.
    """

    def __init__(self, layout: KvLayout, chunk_tokens: int, prefix_reuse: bool) -> None:
        self._block_tokens = layout.block_tokens
        self._chunk_tokens = chunk_tokens
        self._prefix_reuse = prefix_reuse
        self._groups = tuple(_Group(spec) for spec in layout.groups)
        self.blocks_total = sum(spec.blocks for spec in layout.groups)

    @property
    def blocks_used(self) -> int:
        """Held by sequences, in all groups; a shared one counts once."""
        return self.blocks_total - sum(group.available for group in self._groups)

    @property
    def tokens_used(self) -> int:
        """That the held blocks of the first group have a place for: `KvLayout.tokens` at most."""
        first = self._groups[0]
        return (first.spec.blocks - first.available) * self._block_tokens

    def holding(self) -> Holding:
        """For a new sequence: nothing yet."""
        return Holding(len(self._groups))

    def find(self, holding: Holding, ids: Ids[int]) -> int:
        """How many tokens at the beginning of `ids` can be taken from the pool as it is now.

        Whole blocks, and never all of `ids`: the last token has to be computed. Groups that see everything
        need all blocks; a sliding group needs those that the next token still sees.
        """
        if not self._prefix_reuse:
            return 0
        limit = (len(ids) - 1) // self._block_tokens
        self._hash(holding, ids, limit)
        count = limit
        for group in self._groups:
            if group.spec.window is None:
                count = _leading(holding.keys, group.index, count)
        while count and (hole := self._hole(holding.keys, count)) is not None:
            count = hole
        return count * self._block_tokens

    def fits(self, holding: Holding, found: int, tokens: int, spare: bool) -> bool:
        """Whether a sequence that holds nothing could grow to `tokens`, after `take(found)`.

        With `spare`, a hundredth of the blocks (one at least) would stay available in each group.
        """
        for group in self._groups:
            keys = self._needed(group, holding, found)
            shared = sum(group.held[group.index[key]] > 0 for key in keys)
            need = group.spec.blocks_for(tokens, self._chunk_tokens, self._block_tokens) - shared
            if group.available - need < (max(1, group.spec.blocks // 100) if spare else 0):
                return False
        return True

    def take(self, holding: Holding, found: int) -> None:
        """Hold the blocks of the first `found` tokens, as `find` has just promised. It holds nothing yet."""
        blocks = found // self._block_tokens
        for number, group in enumerate(self._groups):
            shared = [group.share(key) for key in self._needed(group, holding, found)]
            holding.dropped[number] = blocks - len(shared)
            holding.tables[number].extend([0] * holding.dropped[number] + shared)
        holding.indexed = blocks
        holding.room = found
        holding.due = self._due(holding)

    def grow(self, holding: Holding, tokens: int) -> bool:
        """Make the tables long enough for `tokens`; False, and nothing changed, when blocks are missing."""
        count = -(-(tokens - holding.room) // self._block_tokens)
        if count <= 0:
            return True
        if any(group.available < count for group in self._groups):
            return False
        for group, table in zip(self._groups, holding.tables, strict=True):
            table.extend([group.lend() for _ in range(count)])
        holding.room += count * self._block_tokens
        return True

    def room(self, holding: Holding) -> int:
        """To how many tokens the tables could grow with what is available."""
        return holding.room + min(group.available for group in self._groups) * self._block_tokens

    def wrote(self, holding: Holding, ids: Ids[int], tokens: int) -> None:
        """The content of the first `tokens` of `ids` is in the pool: full blocks can be found from now on.

        Blocks of sliding groups that no later token sees are given back; 0 stands in their place.
        """
        if tokens < holding.due:
            return
        if self._prefix_reuse:
            self._publish(holding, ids, tokens // self._block_tokens)
        holding.indexed = tokens // self._block_tokens
        for number, group in enumerate(self._groups):
            table = holding.tables[number]
            for place in range(holding.dropped[number], self._first_seen(group, tokens)):
                group.give_back(table[place])
                table[place] = 0
                holding.dropped[number] = place + 1
        holding.due = self._due(holding)

    def release(self, holding: Holding) -> None:
        """Give everything back. The end goes first, so that it is evicted before the beginning it needs.

        The lists that were the tables are left as they are: a step may still look at them.
        """
        for group, table, dropped in zip(self._groups, holding.tables, holding.dropped, strict=True):
            for block in reversed(table[dropped:]):
                group.give_back(block)
        holding.clear(len(self._groups))

    def unpublish(self, holding: Holding) -> None:
        """Let nobody find a block by this sequence's tokens: what it wrote, also when it has given it back,
        what it found, what another wrote at the same time. Who holds such a block keeps it."""
        for group in self._groups:
            for key in holding.keys:
                group.unpublish(key)

    def _publish(self, holding: Holding, ids: Ids[int], full: int) -> None:
        self._hash(holding, ids, full)
        for group, table in zip(self._groups, holding.tables, strict=True):
            for place in range(holding.indexed, full):
                group.publish(table[place], holding.keys[place])

    def _hash(self, holding: Holding, ids: Ids[int], blocks: int) -> None:
        """Make the keys of the first `blocks`; each is made once in the life of a sequence."""
        size, keys = self._block_tokens, holding.keys
        for start in range(len(keys) * size, blocks * size, size):
            content = array("q", ids[start : start + size])
            keys.append(blake2b(content, digest_size=32, key=keys[-1] if keys else b"").digest())

    def _first_seen(self, group: _Group, tokens: int) -> int:
        """The first block that token number `tokens`, the next one, still sees."""
        window = group.spec.window
        return 0 if window is None else max(0, tokens - window + 1) // self._block_tokens

    def _needed(self, group: _Group, holding: Holding, found: int) -> list[bytes]:
        """Keys of the blocks that who goes on after `found` tokens has to hold."""
        return holding.keys[self._first_seen(group, found) : found // self._block_tokens]

    def _hole(self, keys: list[bytes], count: int) -> int | None:
        """The last block that some sliding group misses for going on after `count` blocks; None: none.

        With it missing, no number of blocks above its place and up to `count` will do.
        """
        holes = []
        for group in self._groups:
            if group.spec.window is not None:
                first = self._first_seen(group, count * self._block_tokens)
                places = range(count - 1, first - 1, -1)
                holes.append(next((place for place in places if keys[place] not in group.index), -1))
        last = max(holes, default=-1)
        return None if last < 0 else last

    def _due(self, holding: Holding) -> int:
        """At how many tokens the next block is full or leaves a window."""
        due = (holding.indexed + 1) * self._block_tokens
        for group, dropped in zip(self._groups, holding.dropped, strict=True):
            if group.spec.window is not None:
                due = min(due, (dropped + 1) * self._block_tokens + group.spec.window - 1)
        return due


def _leading(keys: list[bytes], index: dict[bytes, int], limit: int) -> int:
    """How many of the first `limit` keys are in the index before the first that is not."""
    for count in range(limit):
        if keys[count] not in index:
            return count
    return limit
