"""Several sequences on one engine: they join and leave between steps, and share what they can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from engine.sampler import Sampling

if TYPE_CHECKING:
    from engine.generate import Engine

Choose = Callable[[npt.NDArray[np.float32]], int]  # logits (vocab_size,) to the next token


@dataclass(eq=False)
class Sequence:
    """What became of one prompt. `finished`: None while it runs or waits, then "stop", "length" or
    "error", of which `error` tells.
    """

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    stop_ids: frozenset[int]
    choose: Choose | None = None
    tokens: list[int] = field(default_factory=list)
    finished: str | None = None
    error: str | None = None


class Batch:
    """Sequences of one engine, up to `max_sequences` at once; more wait for their turn."""

    def __init__(self, engine: Engine, max_sequences: int = 16) -> None:
        self._engine, self.max_sequences = engine, max_sequences
        self._sequences: list[Sequence] = []

    def add(
        self,
        ids: Sequence_[int],
        *,
        max_tokens: int,
        sampling: Sampling | None = None,
        stop_ids: Sequence_[int] | None = None,
        choose: Choose | None = None,
    ) -> Sequence:
        """A sequence that goes on after `ids`; it waits while there is no room for it.

        EngineError if there can never be. A stop id (by default the model's end-of-sequence ids)
        ends it and is not among its tokens. `choose` takes the place of `sampling`: it is given
        float32 logits (vocab_size,) and returns the token.
        """
        self._engine._check(ids)
        stops = self._engine.config.eos_token_ids if stop_ids is None else stop_ids
        sequence = Sequence(list(ids), max_tokens, sampling or Sampling(), frozenset(stops), choose)
        self._sequences.append(sequence)
        return sequence

    def step(self) -> list[tuple[Sequence, int]]:
        """One pass over all sequences that run; the tokens that came of it, in order.

        There may be several of a sequence. Where it has ended, it says so in `finished`.
        """
        if not self._sequences:
            return []
        sequence = self._sequences[0]
        text = [*sequence.ids, *sequence.tokens]
        if len(sequence.tokens) == sequence.max_tokens or len(text) > self._engine.context:
            return self._finish(sequence, "length")
        try:
            if sequence.choose:
                token = sequence.choose(self._engine.logits(text)[-1])
            else:
                (token,) = self._engine.generate(text, 1, sequence.sampling, ())
        except Exception as error:
            sequence.error = str(error)
            return self._finish(sequence, "error")
        if token in sequence.stop_ids:
            return self._finish(sequence, "stop")
        sequence.tokens.append(token)
        if len(sequence.tokens) == sequence.max_tokens:
            self._finish(sequence, "length")
        return [(sequence, token)]

    def remove(self, sequence: Sequence) -> None:
        """It leaves, finished or not; what it held is free for others."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)

    def _finish(self, sequence: Sequence, reason: str) -> list[tuple[Sequence, int]]:
        sequence.finished = reason
        self._sequences.remove(sequence)
        return []


def generate_batch(
    engine: Engine, prompts: Sequence_[Sequence_[int]], max_tokens: int, sampling: Sampling
) -> Iterator[tuple[int, int]]:
    batch = Batch(engine)
    sequences = [batch.add(ids, max_tokens=max_tokens, sampling=sampling) for ids in prompts]
    numbers = {id(sequence): i for i, sequence in enumerate(sequences)}
    while any(sequence.finished is None for sequence in sequences):
        for sequence, token in batch.step():
            yield numbers[id(sequence)], token
