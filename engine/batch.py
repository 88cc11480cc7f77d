"""Several sequences on one engine: weights are decoded once for all that run.

They join and leave between steps. A step is a pass of rows, one for the next token of each sequence
(model/rows.py). Of newcomers' prompts all but the last token is read before, by passes for prompts
where they are long, or as rows besides the others'. As long as nobody joins, leaves or needs the
host, fast steps are submitted several at once, and the next ones before these have come back.
(Continuous batching: Yu et al. 2022, Orca.)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.blocks import Blocks, Table
from engine.device import Readback
from engine.errors import EngineError
from engine.interrupt import uninterrupted
from engine.plan import encode, gpu_seconds, run
from engine.sampler import STEPS, BatchSampler, Sampling
from model.kv_cache import BLOCK
from model.rows import MATVEC_ROWS, MOST_ROWS, Row, Rows

if TYPE_CHECKING:
    from engine.generate import Engine

Choose = Callable[[npt.NDArray[np.float32]], int]  # logits (vocab_size,) to the next token

_PROMPT_TOKENS = 512  # that a step reads before its rows: the others wait for them
# Of work that a submit brings: enough to hide what it costs, and no more, for whoever joins or
# leaves waits for it.
_SUBMIT_SECONDS, _STEPS_PER_SUBMIT = 0.008, 4


@dataclass(eq=False)
class Sequence:
    """What became of one prompt: `tokens`, which grows, and `finished`, None while it runs or
    waits, then "stop", "length" (of tokens wanted, or of the context) or "error", told in `error`.
    """

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    choose: Choose | None = None
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    error: str | None = None
    reused_tokens: int = 0  # of the prompt: the cache had them already
    _table: Table | None = field(default=None, repr=False)  # while it runs
    _n_read: int = field(default=0, repr=False)  # tokens that the cache holds
    _text: list[int] = field(init=False, repr=False)  # ids and tokens

    def __post_init__(self) -> None:
        self._text = list(self.ids)


@dataclass
class _Submitted:
    """Steps that the GPU has been given: which sequence's token each row draws, if any."""

    readback: Readback
    drawn: list[Sequence | None]
    steps: range


class Batch:
    """Sequences of one engine, up to `max_sequences` at once; more wait for their turn.

    The engine's cache is theirs: while there are any, the engine generates nothing else. Models
    without passes for prompts (exact activations, no loss) run 16 at once.
    `matvec_rows`: rows up to which weights are multiplied where they are decoded.
    """

    def __init__(
        self, engine: Engine, max_sequences: int = 16, matvec_rows: int = MATVEC_ROWS
    ) -> None:
        if not 1 <= max_sequences <= MOST_ROWS:
            raise EngineError(f"max_sequences is {max_sequences}, expected 1 to {MOST_ROWS}")
        self._engine, self._model = engine, engine._model
        engine._stop_active()
        with engine.device.errors():
            self._allocate(max_sequences, matvec_rows)
        self._blocks = Blocks(self._model.cache.n_blocks)
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in the order in which they joined
        self._pending: deque[_Submitted] = deque()
        self._chained = False  # the rows on the GPU are those that run, and continue by themselves
        self._tables_written = False
        self._n_steps = 0  # submitted since the rows were written
        self._step_seconds = float("inf")  # of the last steps that the GPU did without a pause
        self._collected: float | None = None  # when it began the next ones, if it had them by then
        engine._batch = self

    def _allocate(self, max_sequences: int, matvec_rows: int) -> None:
        engine, device = self._engine, self._engine.device
        before = device.allocated_bytes
        self._rows = Rows(self._model, max_sequences, matvec_rows)
        self._sampler = BatchSampler(
            self._model.kernels,
            self._rows.state,
            self._rows.pass_rows,
            self._rows.logits.buffer,
            engine.config.vocab_size,
            self._rows.most,
        )
        self._ring_bytes = 4 * STEPS * self._rows.most
        self._readbacks = [
            Readback(device, f"batch.readback.{i}", self._ring_bytes) for i in range(2)
        ]
        self._logits_readback: Readback | None = None
        self._logits_bytes = 0
        self.scratch_bytes = device.allocated_bytes - before
        self.max_sequences = self._rows.most

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting)

    def add(
        self,
        ids: Tokens[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Tokens[int] | None = None,
        choose: Choose | None = None,
    ) -> Sequence:
        """A sequence that goes on after `ids`; it waits while there is no room for it.

        EngineError if there can never be. A stop id (by default the model's end-of-sequence ids)
        ends it and is not among its tokens. `choose` takes the place of `sampling`: it is given
        float32 logits (vocab_size,) and returns the token; if it raises, the sequence has failed.
        """
        self._engine._check(ids)
        if max_tokens < 0:
            raise EngineError(f"max_tokens is {max_tokens}, expected 0 or more")
        stops = self._engine.config.eos_token_ids if stop_ids is None else stop_ids
        # The last token of all needs no position: it is nobody's input.
        most = min(max_tokens, self._engine.context - len(ids) + 1)
        sequence = Sequence(list(ids), most, sampling or Sampling(), frozenset(stops), choose)
        if not most:
            sequence.finished = "length"
        else:
            self._waiting.append(sequence)
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """It leaves, finished or not; what it held is free for others."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        if sequence._table is not None:
            self._leave(sequence)

    def step(self) -> list[tuple[Sequence, int]]:
        """One pass over all sequences that run; the tokens that came of it, in order.

        There may be several of a sequence: one of each step that was submitted with others. Where
        it has ended, its `finished` says so.
        """
        with self._engine.device.errors():
            return self._step()

    def _step(self) -> list[tuple[Sequence, int]]:
        self._admit()
        if self._pending and not self._chained:
            return self._collect()
        if not self._running:
            return []
        if any(s.choose or len(s._text) - s._n_read > 1 for s in self._running):
            return self._step_with_host()
        return self._chained_steps()

    def _admit(self) -> None:
        """Let those in who wait, in their order, as long as there are rows and blocks."""
        if not self._waiting or len(self._running) == self.max_sequences:
            return
        if not self._running:
            self._engine._claim_cache()
        for sequence in self._running:
            self._keep(sequence)
        while self._waiting and len(self._running) < self.max_sequences:
            sequence = self._waiting[0]
            # The last token is read in any case, as its logits are wanted; and a block for each of
            # those who run is left, or they would have to make room for one another at once.
            known, n_positions = sequence._text[:-1], len(sequence._text)
            table = self._blocks.begin(known, n_positions, spare=len(self._running))
            if table is None:
                return
            self._running.append(self._waiting.popleft())
            sequence._table = table
            sequence._n_read = len(table.serials) * BLOCK
            if not sequence.tokens:
                sequence.reused_tokens = sequence._n_read
            self._chained = False

    def _keep(self, sequence: Sequence) -> None:
        assert sequence._table is not None
        self._blocks.keep(sequence._table, sequence._text, sequence._n_read)

    def _leave(self, sequence: Sequence) -> None:
        assert sequence._table is not None
        self._keep(sequence)
        self._blocks.release(sequence._table)
        sequence._table = None
        self._running.remove(sequence)
        self._chained = False

    def _grow(self, n_steps: int) -> bool:
        """Blocks for what the next steps write. Where there are not enough, those who joined last
        wait again, unless steps are under way: then False. What they held is read again later.
        """
        for sequence in list(self._running):
            while (table := sequence._table) is not None:
                n_blocks = len(table.blocks)
                if self._blocks.grow(table, len(sequence._text) - 1 + n_steps):
                    self._tables_written &= len(table.blocks) == n_blocks
                    break
                if self._pending:
                    return False
                last = self._running[-1]
                self._leave(last)
                self._waiting.appendleft(last)
        return True

    def _chained_steps(self) -> list[tuple[Sequence, int]]:
        """Each row's token is its next input, on the GPU: the host is not waited for."""
        engine = self._engine
        most = 1
        if not engine.device.software:
            most = min(int(_SUBMIT_SECONDS / self._step_seconds) + 1, _STEPS_PER_SUBMIT)
        while len(self._pending) <= engine._submits_ahead:
            under_way = sum(len(submitted.steps) for submitted in self._pending)
            left = min(s.max_tokens - len(s.tokens) for s in self._running) - under_way
            n_steps = min(most, left)
            if n_steps < 1 or not self._grow(under_way + n_steps):
                break
            if not self._chained:
                rows = [
                    Row(s._text[-1], len(s._text) - 1, i, s.sampling.seed)
                    for i, s in enumerate(self._running)
                ]
                self._write_rows(rows, self._running)
                self._chained = True
            if not self._tables_written:
                self._write_tables(self._running)
            self._pending.append(self._submit(list(self._running), n_steps))
        return self._collect()

    def _step_with_host(self) -> list[tuple[Sequence, int]]:
        """A pass that is put together here: with prompts, or with tokens that are chosen here."""
        assert not self._pending
        self._grow(1)
        left = _PROMPT_TOKENS
        for sequence in self._running:
            left -= self._read_prompt(sequence, left)
        rows: list[Row] = []
        of_rows: list[Sequence] = []
        drawn: list[Sequence | None] = []
        spare = self._rows.most - sum(len(s._text) - s._n_read <= 1 for s in self._running)
        for sequence in self._running:
            end = len(sequence._text)
            begin = min(sequence._n_read, end - 1)  # whose token may not have come back
            if end - begin > 1:
                if self._is_long(sequence):
                    continue
                end = min(end, begin + spare)
                spare -= end - begin
            first = len(rows)
            for pos in range(begin, end):
                rows.append(Row(sequence._text[pos], pos, first, sequence.sampling.seed))
                of_rows.append(sequence)
                drawn.append(sequence if pos == len(sequence._text) - 1 else None)
            sequence._n_read = end
        if not rows:
            return []
        self._write_rows(rows, of_rows)
        self._write_tables(of_rows)
        self._pending.append(self._submit(drawn, 1))
        return self._collect()

    def _is_long(self, sequence: Sequence) -> bool:
        """Whether what is left of its prompt, but for the last token, is for passes of prompts."""
        prompt = self._model.prompt
        n_left = len(sequence._text) - 1 - sequence._n_read
        return prompt is not None and n_left >= prompt.min_tokens

    def _read_prompt(self, sequence: Sequence, most: int) -> int:
        """Read up to so many tokens of a long prompt; returns how many."""
        prompt, pos = self._model.prompt, sequence._n_read
        if prompt is None or not self._is_long(sequence):
            return 0
        n = min(len(sequence._text) - 1 - pos, prompt.max_tokens, most)
        if n < prompt.min_tokens:
            return 0
        assert sequence._table is not None
        prompt.write_state(pos, sequence._text[pos : pos + n])
        prompt.write_blocks(sequence._table.blocks)
        for plan in prompt.layers(n, paged=True):
            run(self._engine.device, plan)
        sequence._n_read += n
        return n

    def _write_rows(self, rows: Tokens[Row], of_rows: Tokens[Sequence]) -> None:
        self._rows.write_rows(rows)
        self._sampler.configure([sequence.sampling for sequence in of_rows])
        self._tables_written = False
        self._n_steps = 0

    def _write_tables(self, of_rows: Tokens[Sequence]) -> None:
        self._rows.write_blocks([s._table.blocks if s._table else [] for s in of_rows])
        self._tables_written = True

    @uninterrupted()
    def _submit(self, drawn: list[Sequence | None], n_steps: int) -> _Submitted:
        device, rows = self._engine.device, self._rows
        bucket = rows.bucket(len(drawn))
        encoder = device.wgpu.create_command_encoder()
        encode(encoder, [rows.plan(bucket), self._sampler.plan(bucket)] * n_steps)
        readback = self._readbacks[0]
        self._readbacks.reverse()
        target = readback.buffer
        encoder.copy_buffer_to_buffer(self._sampler.sampled, 0, target, 0, self._ring_bytes)
        choosing = [i for i, s in enumerate(drawn) if s is not None and s.choose]
        if choosing:
            row_bytes = 4 * self._engine.config.vocab_size
            target = self._chosen_from(len(choosing) * row_bytes).buffer
            for i, row in enumerate(choosing):
                source = rows.logits.buffer, row * row_bytes
                encoder.copy_buffer_to_buffer(*source, target, i * row_bytes, row_bytes)
        readback.submit(encoder.finish())
        steps = range(self._n_steps, self._n_steps + n_steps)
        self._n_steps += n_steps
        return _Submitted(readback, drawn, steps)

    def _chosen_from(self, size_bytes: int) -> Readback:
        """Where logits of those who choose on the host come back."""
        if size_bytes > self._logits_bytes:
            device = self._engine.device
            self._logits_readback = Readback(device, "batch.logits_readback", size_bytes)
            self._logits_bytes = size_bytes
        assert self._logits_readback is not None
        return self._logits_readback

    def _collect(self) -> list[tuple[Sequence, int]]:
        """Wait for the first of what is under way, and hand out its tokens."""
        if not self._pending:
            return []
        submitted = self._pending.popleft()
        n_choosing = sum(s is not None and s.choose is not None for s in submitted.drawn)
        logits: Iterator[npt.NDArray[np.float32]] = iter(())
        try:
            ring = submitted.readback.read()
            if n_choosing:
                assert self._logits_readback is not None
                values = self._logits_readback.read().view(np.float32)
                vocab_size = self._engine.config.vocab_size
                logits = iter(values[: n_choosing * vocab_size].reshape(-1, vocab_size))
        except BaseException:  # Ctrl-C, for one: what is under way will be done again
            self._pending.clear()
            self._chained, self._collected = False, None
            raise
        now = time.perf_counter()
        if self._collected is not None:
            self._step_seconds = (now - self._collected) / len(submitted.steps)
        self._collected = now if self._pending else None
        tokens = []
        for step in submitted.steps:
            for row, sequence in enumerate(submitted.drawn):
                if sequence is None:
                    continue
                scores = next(logits) if sequence.choose else None
                if sequence._table is None:
                    continue  # it has left meanwhile
                token = self._deliver(
                    sequence, int(ring[step % STEPS * self._rows.most + row]), scores
                )
                if token is not None:
                    tokens.append((sequence, token))
        return tokens

    def _deliver(
        self, sequence: Sequence, token: int, logits: npt.NDArray[np.float32] | None
    ) -> int | None:
        """Its next token, if there is one."""
        sequence._n_read = len(sequence._text)
        if sequence.choose and logits is not None:
            try:
                token = int(sequence.choose(logits))
                self._engine._check([token])
            except Exception as error:  # of the caller's code: it is this sequence's alone
                self._finish(sequence, "error", str(error) or type(error).__name__)
                return None
        if token in sequence.stop_ids:
            self._finish(sequence, "stop")
            return None
        sequence.tokens.append(token)
        sequence._text.append(token)
        if len(sequence.tokens) == sequence.max_tokens:
            self._finish(sequence, "length")
        return token

    def _finish(self, sequence: Sequence, reason: str, error: str | None = None) -> None:
        sequence.finished, sequence.error = reason, error
        self._leave(sequence)

    def gpu_seconds(self, n: int) -> float | None:
        """GPU time of a step of the first n that run, for benchmarks: the tokens are thrown away.
        None without timestamps.
        """
        self._chained = False
        bucket = self._rows.bucket(n)
        plans = [self._rows.plan(bucket), self._sampler.plan(bucket)]
        return gpu_seconds(self._engine.device, *plans)

    def forget(self) -> None:
        """Something else has used the cache; EngineError if that is not possible now."""
        if self.busy:
            raise EngineError(
                "a batch of sequences has the engine; let them finish, or remove them"
            )
        self._blocks.forget()
