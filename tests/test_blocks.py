"""Blocks of the cache: a model of what they hold, under random comings and goings."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.blocks import Blocks, Table
from model.kv_cache import BLOCK

N_BLOCKS = 12

# Texts that often begin alike: pieces of one of two tokens, about half a block long.
texts = st.lists(st.sampled_from([(1,) * 8, (2,) * 8, (1, 2, 3)]), min_size=1, max_size=9).map(
    lambda pieces: [token for piece in pieces for token in piece]
)


class Sequences(RuleBasedStateMachine):
    """Sequences that read into their blocks what their texts say, as the cache would."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = Blocks(N_BLOCKS)
        self.running: list[tuple[Table, list[int]]] = []
        self.cache: list[tuple[int, ...] | None] = [None] * N_BLOCKS  # text up to each block's end

    def read(self, table: Table, text: list[int]) -> None:
        for i in range(len(table.serials), len(text) // BLOCK):
            self.cache[table.blocks[i]] = tuple(text[: (i + 1) * BLOCK])
        for i in range(len(text) // BLOCK, len(table.blocks)):
            self.cache[table.blocks[i]] = None  # half full, or not at all
        self.blocks.keep(table, text, len(text))

    @rule(text=texts, spare=st.integers(0, 3))
    def begin(self, text: list[int], spare: int) -> None:
        free = self.blocks.n_free
        table = self.blocks.begin(text, len(text) + 1, spare)
        if table is None:
            assert self.blocks.n_free == free
            assert free - spare < len(text) // BLOCK + 1  # otherwise there was room
            return
        assert len(table.blocks) == len(text) // BLOCK + 1
        shared = len(table.serials)
        for i in range(shared):
            assert self.cache[table.blocks[i]] == tuple(text[: (i + 1) * BLOCK])
        # No less than what those who run hold.
        held = [t for _, t in self.running]
        alike = max((_alike(text, t) // BLOCK for t in held), default=0)
        assert shared >= alike
        self.running.append((table, text))
        self.read(table, text)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), more=texts)
    def grow(self, which: int, more: list[int]) -> None:
        table, text = self.running[which % len(self.running)]
        before = list(table.blocks)
        if self.blocks.grow(table, len(text) + len(more)):
            assert table.blocks[: len(before)] == before
            text.extend(more)
            self.read(table, text)
        else:
            assert table.blocks == before

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def release(self, which: int) -> None:
        table, _ = self.running.pop(which % len(self.running))
        self.blocks.release(table)
        assert not table.blocks

    @precondition(lambda self: not self.running)
    @rule()
    def forget(self) -> None:
        self.blocks.forget()
        self.cache = [None] * N_BLOCKS

    @invariant()
    def each_block_is_free_or_somebodys(self) -> None:
        used = [block for table, _ in self.running for block in table.blocks]
        assert self.blocks.n_free == N_BLOCKS - len(set(used))
        for table, _ in self.running:
            assert len(set(table.blocks)) == len(table.blocks)

    @invariant()
    def nobody_writes_to_what_others_read(self) -> None:
        for table, text in self.running:
            for i in range(len(text) // BLOCK):
                assert self.cache[table.blocks[i]] == tuple(text[: (i + 1) * BLOCK])


def _alike(a: list[int], b: list[int]) -> int:
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    return n


TestSequences = Sequences.TestCase
TestSequences.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_what_was_freed_is_found_again_until_it_is_needed() -> None:
    blocks, text = Blocks(4), list(range(3 * BLOCK))
    table = blocks.begin(text, 3 * BLOCK)
    assert table is not None
    blocks.keep(table, text, len(text))
    blocks.release(table)
    other = blocks.begin([], 2 * BLOCK)  # the fourth, which was never used, and the last one freed
    assert other is not None and other.blocks == [3, 2]
    again = blocks.begin(text, 2 * BLOCK)
    assert again is not None and again.blocks == [0, 1] and len(again.serials) == 2
