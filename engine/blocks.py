"""Blocks of the cache: who has which, what they hold, and who may share them. No GPU here.

A block is handed out whole and holds the keys and values of BLOCK positions. What a full one holds
depends on its tokens and on all before them, so it is known by these: a newcomer whose text begins
alike takes it as it is. Only full blocks are shared, and nobody writes to those again, so none is
ever copied. Freed ones keep what they hold until they are needed, those longest unused first.
(Paged attention, Kwon et al. 2023.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from model.kv_cache import BLOCK

_Key = tuple[int, tuple[int, ...]]  # serial of the block before, tokens


@dataclass(eq=False)
class Table:
    """The blocks of one sequence, in order of its positions."""

    blocks: list[int] = field(default_factory=list)
    serials: list[int] = field(default_factory=list)  # of what the first ones are known to hold


class Blocks:
    """`n_blocks` of them, free at first."""

    def __init__(self, n_blocks: int) -> None:
        self._users = [0] * n_blocks
        self._free = dict.fromkeys(range(n_blocks))  # in the order in which they were freed
        self._keys: dict[int, _Key] = {}  # of blocks whose contents are known
        self._known: dict[_Key, tuple[int, int]] = {}  # block and serial of what it holds
        self._serial = 0

    @property
    def n_free(self) -> int:
        return len(self._free)

    def begin(self, tokens: Sequence[int], n_positions: int, spare: int = 0) -> Table | None:
        """A table for `n_positions`, whose first blocks hold what is known of `tokens`: as many as
        it has serials. None where there is no room, with `spare` blocks left.
        """
        table, serial = Table(), 0
        for first in range(0, len(tokens) - BLOCK + 1, BLOCK):
            known = self._known.get((serial, tuple(tokens[first : first + BLOCK])))
            if known is None:
                break
            block, serial = known
            table.blocks.append(block)
            table.serials.append(serial)
            self._users[block] += 1
            self._free.pop(block, None)
        if self.grow(table, n_positions, spare):
            return table
        self.release(table)
        return None

    def grow(self, table: Table, n_positions: int, spare: int = 0) -> bool:
        """Give it blocks for so many positions in all; False, and none, where there are too few."""
        wanted = -(-n_positions // BLOCK) - len(table.blocks)
        if wanted > 0 and wanted + spare > len(self._free):
            return False
        for _ in range(wanted):
            block = next(iter(self._free))
            del self._free[block]
            if key := self._keys.pop(block, None):
                del self._known[key]
            self._users[block] = 1
            table.blocks.append(block)
        return True

    def keep(self, table: Table, tokens: Sequence[int], n_read: int) -> None:
        """The cache holds the first `n_read` of its tokens: full blocks may be shared."""
        for i in range(len(table.serials), n_read // BLOCK):
            serial = table.serials[-1] if i else 0
            key = serial, tuple(tokens[i * BLOCK : (i + 1) * BLOCK])
            if key not in self._known:  # otherwise another block holds the same, and is known
                self._serial += 1
                self._known[key] = table.blocks[i], self._serial
                self._keys[table.blocks[i]] = key
            table.serials.append(self._known[key][1])

    def release(self, table: Table) -> None:
        """Take all its blocks back. The last are the first to be used again: without those before
        them they are of no use.
        """
        for block in reversed(table.blocks):
            self._users[block] -= 1
            if not self._users[block]:
                self._free[block] = None
        table.blocks, table.serials = [], []

    def forget(self) -> None:
        """Others have written to the cache; nothing is known of what it holds."""
        self._keys.clear()
        self._known.clear()
