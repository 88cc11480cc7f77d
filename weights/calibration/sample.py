"""Calibration text by the model itself: many texts sampled at once, in numpy.

Needs the whole model in float32 in memory, as nothing else here does.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import count, cycle
from pathlib import Path
from threading import Event
from typing import Self

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from model.config import ModelConfig
from model.reference import Floats, Integers, embed, matvec, rms_norm
from weights.calibration.layer import Layer, Product, activate, output
from weights.container import replacing
from weights.layout import EMBEDDING, HEAD
from weights.sources import Source

Tokens = npt.NDArray[np.int64]

_DRAW_BLOCK = 256  # tokens of a vocabulary whose probabilities are summed first
# Texts that a core writes together; whatever the number of cores, so that roundings are the same.
# Of fewer, reading the weights is most of the work.
_TEXTS = 16
_SMALL = 10**6
_SHARED = 1 << 22  # weights of a matrix that are worth several cores


def sample_tokens(
    source: Source,
    n_sequences: int,
    length: int,
    openings: Sequence[Sequence[int]] = (),
    seed: int = 0,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> Tokens:
    """(n_sequences, length) tokens that the model writes; `progress(steps done, steps in all)`.

    Texts that are done are kept in `folder`, if there is one, and taken from there: it belongs to
    this model and these arguments. WeightsError: they cannot be kept.
    Texts begin after what separates them in training, BOS or else end of text, every second one
    instead with the next of `openings`; and go on as the model likes, past an end of text too. At
    temperature 1 the default model writes questions and answers on all sorts of things, articles,
    stories, lists and code, now and then a foreign language or a table of noise. At 0.8 texts are
    smoother, and worse for calibration; so are chats that the template opens, which begin all
    alike.
    """
    c = source.config
    rng = np.random.default_rng(seed)
    tokens = np.empty((n_sequences, length), np.int64)
    separators = [c.bos_token_id, *c.eos_token_ids]
    first = next((token for token in separators if token is not None), None)
    begun = np.full((n_sequences, length), -1)  # -1 where the model writes
    begun[:, 0] = rng.integers(c.vocab_size, size=n_sequences) if first is None else first
    for text, opening in zip(begun[1::2], cycle(openings), strict=False):
        text[: len(opening)] = opening[:length]
    tokens[:, 0] = begun[:, 0]

    uniform = rng.random((length, n_sequences))
    weights, steps_done = DenseLlama.read(source), count(1)
    groups = [slice(begin, begin + _TEXTS) for begin in range(0, n_sequences, _TEXTS)]
    n_cores, stopped = os.cpu_count() or 1, Event()

    def tell(_: int) -> None:
        if progress is not None:
            progress(next(steps_done), len(groups) * (length - 1))

    # Where a damaged model's numbers are too large, the calibration will say so.
    @np.errstate(over="ignore", invalid="ignore")
    def write(group: slice) -> None:
        texts = tokens[group]  # (texts, length), a view
        done = None if folder is None else folder / f"{group.start}.npy"
        if done is not None and done.is_file():
            texts[:] = np.load(done)
            deque(map(tell, range(1, length)), maxlen=0)
            return
        model = BatchedLlama(c, weights, len(texts), length, spread)
        for pos in range(1, length):
            if stopped.is_set():
                return
            logits = model.step(texts[:, pos - 1])
            logits /= temperature
            drawn = draw(softmax(logits), uniform[pos, group])
            texts[:, pos] = np.where(begun[group, pos] < 0, drawn, begun[group, pos])
            tell(pos)
        if done is not None:
            with replacing(done) as file:
                np.save(file, texts)

    # Threads of BLAS would wait for cores.
    with (
        threadpool_limits(1, "blas"),
        ThreadPoolExecutor(n_cores) as helpers,
        ThreadPoolExecutor(n_cores) as writers,
    ):
        spread = partial(product, pool=helpers, ways=n_cores // len(groups))
        try:
            deque(writers.map(write, groups), maxlen=0)
        finally:
            stopped.set()  # after Ctrl-C no text is written to its end
    return tokens


@dataclass(frozen=True)
class DenseLlama:
    """All weights of a model."""

    layers: list[Layer]
    norm: Floats
    embedding: Floats
    head: Floats

    @classmethod
    def read(cls, source: Source) -> Self:
        embedding = source.read(f"{EMBEDDING}.weight")
        return cls(
            layers=[Layer.read(source, i) for i in range(source.config.n_layers)],
            norm=source.read("model.norm.weight"),
            embedding=embedding,
            head=embedding if source.config.tie_embeddings else source.read(f"{HEAD}.weight"),
        )


class BatchedLlama:
    """A model that reads one token of each of `batch` texts at a time, with a cache for each."""

    def __init__(
        self,
        config: ModelConfig,
        weights: DenseLlama,
        batch: int,
        length: int,
        product: Product = matvec,
    ) -> None:
        self._config = config
        self._weights = weights
        self._product = product
        self.pos = 0  # tokens of each text that it has read
        shape = (config.n_layers, length, batch * config.n_kv_heads, config.head_dim)
        self._k_cache = np.empty(shape, weights.norm.dtype)
        self._v_cache = np.empty(shape, weights.norm.dtype)

    def step(self, token_ids: Integers) -> Floats:
        """The next token of each text, (batch,) -> logits (batch, vocab_size)."""
        c, w = self._config, self._weights
        x = embed(w.embedding, token_ids)
        for layer, k_cache, v_cache in zip(w.layers, self._k_cache, self._v_cache, strict=True):
            activations = activate(c, layer, x, k_cache, v_cache, self.pos, self._product)
            x = output(layer, activations, self._product)
        self.pos += 1
        return self._product(w.head, rms_norm(x, w.norm, c.norm_eps))


def product(w: Floats, x: Floats, pool: ThreadPoolExecutor, ways: int) -> Floats:
    """`matvec` for few tokens x (tokens, cols), by parts of W, on so many cores.

    OpenBLAS first copies what it multiplies, which here would be most of the work, but for small
    products: of up to 10^6 terms. The parts are the same on any number of cores.
    """
    rows, cols = w.shape
    columns = np.ascontiguousarray(x.T)  # (cols, tokens)
    y = np.empty((rows, len(x)), x.dtype)
    part = max(8, _SMALL // columns.size)  # rows
    whole = rows - rows % part
    parts, y_parts = w[:whole].reshape(-1, part, cols), y[:whole].reshape(-1, part, len(x))

    def work(begin: int) -> None:
        np.matmul(parts[begin : begin + step], columns, out=y_parts[begin : begin + step])

    step = max(1, -(-len(parts) // ways) if ways > 1 and w.size >= _SHARED else len(parts))
    begins = range(0, len(parts), step)
    deque(pool.map(work, begins) if len(begins) > 1 else map(work, begins), maxlen=0)
    np.matmul(w[whole:], columns, out=y[whole:])
    return np.ascontiguousarray(y.T)


def softmax(logits: Floats) -> Floats:
    """Along the last axis, in place."""
    logits -= np.max(logits, axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= np.sum(logits, axis=-1, keepdims=True)
    return logits


def draw(p: Floats, uniform: Floats) -> Tokens:
    """Rows of probabilities (n, vocab_size), numbers in [0, 1) (n,) -> an index for each row (n,).

    By inversion: the first at which the cumulated probability reaches the number; cumulated over
    blocks of the vocabulary first, then within the block where that is.
    """
    n, size = p.shape
    sums = np.add.reduceat(p, np.arange(0, size, _DRAW_BLOCK), axis=-1, dtype=np.float64)
    cdf = np.cumsum(sums, axis=-1)
    wanted = uniform * cdf[:, -1]
    rows = np.arange(n)
    block = np.argmax(cdf >= wanted[:, None], axis=-1)
    index = block[:, None] * _DRAW_BLOCK + np.arange(_DRAW_BLOCK)
    inside = np.where(index < size, p[rows[:, None], np.minimum(index, size - 1)], 0)
    cdf_inside = np.cumsum(inside, axis=-1, dtype=np.float64)
    # What is left to be reached here; rounding may put it a little beyond the block's end.
    wanted -= cdf[rows, block] - sums[rows, block]
    reached = cdf_inside >= np.minimum(wanted, cdf_inside[:, -1])[:, None]
    drawn: Tokens = index[rows, np.argmax(reached, axis=-1)]
    return drawn
