"""One generation: what is submitted when, what comes back, and what an answer took."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.device import Readback
from engine.sampler import RING, Sampling
from engine.speculate import LOOKUP, MODEL, Draft
from model.llama import MAX_TOKENS

if TYPE_CHECKING:
    from engine.generate import Engine

_MOST_SINKS = 64


@dataclass
class Stats:
    """What one generation took. The first answer token counts as the prompt's time."""

    prompt_tokens: int = 0
    reused_tokens: int = 0  # of the prompt: already in the cache
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    generate_seconds: float = 0.0
    checks: int = 0  # passes over drafted tokens
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of those drafted
    slides: int = 0  # times that the context was full and its middle was forgotten
    finish_reason: str | None = None  # "stop", "length", "context"; None: unfinished


def kept_of_full(text: Sequence[int], context: int) -> list[int]:
    """What is read again of a text that has filled the context: its beginning and its latest half.

    The beginning, because attention leans on it, whatever stands there (attention sinks, Xiao et
    al. 2024); half, so that half a context of answer passes until the next time. Keys are cached
    rotated to their positions: what moves must be computed again.
    """
    n_sinks = min(_MOST_SINKS, context // 8)
    return [*text[:n_sinks], *text[-max(1, context // 2) :]]


@dataclass
class _Submitted:
    """Work that the GPU has been given."""

    readback: Readback
    n_steps: int  # tokens that it will draw; of a check the least
    draft: Draft | None
    time: float


class Generation:
    """An iterator of token ids. `stats` is up to date at every token; `close` ends it at once."""

    def __init__(
        self,
        engine: Engine,
        token_ids: list[int],
        max_tokens: int,
        sampling: Sampling,
        stop_ids: frozenset[int],
        speculate: bool,
        slide: bool,
    ) -> None:
        self.stats = Stats(prompt_tokens=len(token_ids))
        self._engine, self._sampling = engine, sampling
        self._speculate, self._slide = speculate, slide
        self._tokens = self._run(token_ids, max_tokens, stop_ids)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        with self._engine.device.errors():
            return next(self._tokens)

    def close(self) -> None:
        self._tokens.close()

    def _run(self, token_ids: list[int], max_tokens: int, stop_ids: frozenset[int]) -> Any:
        stats = self.stats
        start = time.perf_counter()
        for token in self._draw(token_ids, max_tokens):
            now = time.perf_counter()
            if not stats.prompt_seconds:
                stats.prompt_seconds = now - start
                start = now
            else:
                stats.generate_seconds = now - start
            if token in stop_ids:
                stats.finish_reason = "stop"
                return
            stats.generated_tokens += 1
            yield token
        stats.finish_reason = "length" if stats.generated_tokens == max_tokens else "context"

    def _draw(self, text: list[int], max_tokens: int) -> Iterator[int]:
        """Tokens after `text`, which grows by them, until the context is full or for ever."""
        n_drawn, sampling, context = 0, self._sampling, self._engine.context
        if self._speculate:
            self._engine._lookup.begin(text)
            self._engine._policy.begin()
        while True:
            # The prompt's own last pass samples the first token; each further token takes one step,
            # whose input must still have a position.
            room = context - len(text) + 1
            for token in self._draw_within(text, min(max_tokens - n_drawn, room), sampling):
                n_drawn += 1
                text.append(token)
                yield token
            if n_drawn == max_tokens or not self._slide:
                return
            text = kept_of_full(text, context)
            self.stats.slides += 1
            # Positions come again, and the noise of the draws must not.
            seed = (sampling.seed + 0x9E3779B9) % (1 << 32)
            sampling = dataclasses.replace(sampling, seed=seed)

    def _draw_within(self, text: list[int], wanted: int, sampling: Sampling) -> Iterator[int]:
        """`wanted` tokens after `text`, for all of which there is room."""
        if wanted < 1:
            return
        engine, prompt = self._engine, list(text)
        waited = time.perf_counter()
        reused = engine._read_prompt(prompt, sampling)
        if not self.stats.slides:
            self.stats.reused_tokens = reused
        engine._cached = prompt
        # The prompt's own: nothing left to compute, to be shown at once.
        pending = deque([_Submitted(engine._submit(), 0, None, waited)])
        read = previous = 0
        submitted = 1
        singles = 0  # submits of single steps in a row
        while read < wanted:
            draft = self._choose(wanted - read) if read else None
            if draft is None:
                while submitted < wanted and len(pending) <= engine._submits_ahead:
                    n = min(self._steps_per_submit(singles), wanted - submitted)
                    now = time.perf_counter()
                    pending.append(_Submitted(engine._submit_steps(n), n, None, now))
                    submitted += n
                    singles += 1
            elif not pending:
                now = time.perf_counter()
                readback = engine._submit_check(draft, previous, sampling, read)
                pending.append(_Submitted(readback, 1, draft, now))
                singles = 0
            done = pending.popleft()
            ring = done.readback.read()
            now = time.perf_counter()
            tokens = [int(ring[i % RING]) for i in range(read, int(ring[RING]))]
            if self._speculate:
                self._learn(done, tokens, now - max(waited, done.time))
            waited = now
            if done.draft:
                submitted = read + len(tokens)
                if engine._draft and done.draft.source == MODEL:  # it has read what it drafted
                    engine._draft._cached = [*engine._cached, previous, *tokens[:-1]]
            for token in tokens:
                if read:
                    engine._cached.append(previous)  # it was this step's input
                read += 1
                previous = token
                yield token

    def _steps_per_submit(self, singles: int) -> int:
        """As many as keep the GPU busy, after so many `singles`.

        A check waits for what is under way: so half as many where there may be one, and few after
        one or where the next is near.
        """
        most = self._engine._tokens_per_submit
        if not self._speculate:
            return most
        if self._engine._lookup.promising:
            return 1
        return min(1 + singles // 2, max(1, most // 2))

    def _choose(self, most: int) -> Draft | None:
        """What to check next, of at most `most` tokens."""
        if not self._speculate:
            return None
        engine = self._engine
        shares = {LOOKUP: engine._lookup.shares(MAX_TOKENS - 1)}
        if engine._draft is not None and len(engine._cached) + MAX_TOKENS <= engine._draft.context:
            shares[MODEL] = [engine._draft_chance.share] * (MAX_TOKENS - 1)
        return engine._policy.choose(shares, most)

    def _learn(self, done: _Submitted, tokens: list[int], seconds: float) -> None:
        engine, stats = self._engine, self.stats
        for token in tokens:
            engine._lookup.add(token)
        if done.draft is None:
            if done.n_steps:
                engine._policy.stepped(done.n_steps, seconds)
            return
        n_drafted, n_right = done.draft.n_tokens - 1, len(tokens) - 1
        stats.checks += 1
        stats.drafted_tokens += n_drafted
        stats.accepted_tokens += n_right
        engine._policy.checked(done.draft, len(tokens), seconds)
        if done.draft.source == MODEL:
            for i in range(min(n_right + 1, n_drafted)):
                engine._draft_chance.add(i < n_right)
