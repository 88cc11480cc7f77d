"""How fast several sequences run at once: generated tokens of all of them together.

Part of `answer bench` (--batch). Each row has as many sequences as it says, which begin with a
random token each and run side by side from their first token to their last: the clock runs from
when they have the first, and none joins or leaves meanwhile. Beside the speed stands what a step of
all takes, and what of that is the GPU's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.batch import Batch
from engine.errors import EngineError
from engine.generate import Engine
from model.kv_cache import BLOCK

_PROMPT = 1  # tokens: all are read in one step
_WARM_UP_SECONDS = 0.5


@dataclass(frozen=True)
class BatchRow:
    sequences: int
    tokens_per_second: float  # of all together: median of the repeats
    slowest: float
    fastest: float
    step_ms: float
    gpu_step_ms: float | None  # None without timestamps


def positions(n: int, n_tokens: int) -> int:
    """What n sequences take of the cache: whole blocks, and one to spare for each."""
    return n * (-(-(_PROMPT + n_tokens) // BLOCK) + 1) * BLOCK


def bench_batch(
    engine: Engine,
    sizes: Sequence[int],
    n_tokens: int,
    repeats: int,
    matvec_rows: int | None = None,
) -> list[BatchRow]:
    """A row for each number of sequences, of `n_tokens` each.

    `matvec_rows`: see engine.batch.Batch.
    """
    rng = np.random.default_rng(0)
    room = engine.cache.max_pos
    needed = positions(max(sizes, default=0), n_tokens)
    if needed > room:
        raise EngineError(
            f"so many sequences need {needed} positions in the cache, there are {room}; ask for "
            "fewer, or fewer tokens"
        )
    rows = []
    for n in sizes:
        batch = Batch(engine, n, **({} if matvec_rows is None else {"matvec_rows": matvec_rows}))
        if batch.max_sequences < n:
            raise EngineError(
                f"this model runs {batch.max_sequences} sequences at once, {n} are asked for"
            )
        start = time.perf_counter()
        while time.perf_counter() - start < _WARM_UP_SECONDS:
            _run(engine, batch, rng, n, n_tokens)
        rates = [_run(engine, batch, rng, n, n_tokens) for _ in range(repeats)]
        median = statistics.median(rates)
        gpu = [batch.gpu_seconds(n) for _ in range(5)]
        gpu_ms = [1e3 * seconds for seconds in gpu if seconds is not None]
        rows.append(
            BatchRow(
                n,
                median,
                min(rates),
                max(rates),
                1e3 * n / median,
                statistics.median(gpu_ms) if gpu_ms else None,
            )
        )
    return rows


def _run(engine: Engine, batch: Batch, rng: np.random.Generator, n: int, n_tokens: int) -> float:
    """Tokens a second, from when all have their first one to the end of all, which is the same."""
    prompts = rng.integers(0, engine.config.vocab_size, (n, _PROMPT)).tolist()
    sequences = [batch.add(prompt, max_tokens=n_tokens, stop_ids=()) for prompt in prompts]
    while not all(sequence.tokens for sequence in sequences):
        batch.step()
    before = sum(len(sequence.tokens) for sequence in sequences)
    start = time.perf_counter()
    while batch.busy:
        batch.step()
    return (n * n_tokens - before) / (time.perf_counter() - start)


def markdown(rows: Sequence[BatchRow]) -> str:
    lines = [
        "| sequences | tokens/s | slowest to fastest | ms a step | of it GPU |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        gpu = "" if row.gpu_step_ms is None else f"{row.gpu_step_ms:.2f}"
        lines.append(
            f"| {row.sequences} | {row.tokens_per_second:.1f} | {row.slowest:.1f} to "
            f"{row.fastest:.1f} | {row.step_ms:.2f} | {gpu} |"
        )
    return "\n".join(lines)
