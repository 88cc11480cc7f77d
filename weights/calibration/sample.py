"""Calibration text by the model itself: many texts sampled at once, in numpy.

Needs the whole model in float32 in memory, as nothing else here does.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from engine.errors import EngineError
from engine.tokenizer import Tokenizer
from model.config import ModelConfig
from model.reference import Floats, Integers, embed, matvec, rms_norm
from weights.calibration.layer import Layer, Product, activate, output
from weights.layout import EMBEDDING, HEAD
from weights.sources import Source

Tokens = npt.NDArray[np.int64]

_PART = 1 << 19  # weights; whatever the number of cores, so that roundings are the same
_MARK = "<<content>>"  # where a user's text would begin


def sample_tokens(
    source: Source,
    n_sequences: int,
    length: int,
    seed: int = 0,
    temperature: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Tokens:
    """(n_sequences, length) tokens that the model writes; `progress(positions done, length)`.

    Every other sequence begins as a chat up to where the user speaks, if there is a template, and
    goes on with turns of its own; the others are documents, one after the other, after BOS or else
    end of text. At temperature 1 the default model's chats are questions and answers on all sorts
    of things, code among them, fluent but ever less sensible; its documents are like the web:
    articles, stories, forums, lists, code, now and then a foreign language or a table of noise.
    """
    c = source.config
    rng = np.random.default_rng(seed)
    document, chat = _document_opening(source), _chat_opening(source)
    is_chat = [bool(chat) and i % 2 == 0 for i in range(n_sequences)]
    forced = [list(chat if chats else document) for chats in is_chat]  # what is to come first
    tokens = np.empty((n_sequences, length), np.int64)
    tokens[:, 0] = rng.integers(c.vocab_size, size=n_sequences)

    uniform = rng.random((length, n_sequences))
    # A thread works on its own rows: products that are threaded too would wait for cores.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        model = BatchedLlama(
            c, DenseLlama.read(source), n_sequences, length, partial(product, pool)
        )
        for pos in range(length):
            if pos > 0:
                logits = model.step(tokens[:, pos - 1])
                logits /= temperature
                tokens[:, pos] = draw(softmax(logits), uniform[pos])
            for i, opening in enumerate(forced):
                if opening:
                    tokens[i, pos] = opening.pop(0)
                elif tokens[i, pos] in c.eos_token_ids and not is_chat[i]:
                    # Where end of text is what separates, it has been said.
                    opening += [token for token in document if token != tokens[i, pos]]
            if progress is not None:
                progress(pos + 1, length)
    return tokens


def _document_opening(source: Source) -> list[int]:
    """What separates texts in training: BOS, or else end of text; nothing if there is neither."""
    c = source.config
    return [c.bos_token_id] if c.bos_token_id is not None else list(c.eos_token_ids[:1])


def _chat_opening(source: Source) -> list[int]:
    """A chat up to where the user speaks; nothing without a template that allows it.

    What follows the user's turn need not be forced: a model with a template knows how it goes on.
    """
    tokenizer = Tokenizer(source.tokenizer_json, source.chat_template, source.config)
    try:
        chat = tokenizer.chat_prompt([{"role": "user", "content": _MARK}], False)
    except EngineError:
        return []
    before, mark, _ = chat.partition(_MARK)
    return tokenizer.encode(before) if mark and before else []


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


def product(pool: ThreadPoolExecutor, w: Floats, x: Floats) -> Floats:
    """`matvec` for few tokens, where to read the weights is the work: parts of them at once."""
    y = np.empty((len(w), len(x)), x.dtype)
    step = max(1, _PART // w.shape[1])

    def work(begin: int) -> None:
        np.matmul(w[begin : begin + step], x.T, out=y[begin : begin + step])

    deque(pool.map(work, range(0, len(w), step)), maxlen=0)
    return y.T


def softmax(logits: Floats) -> Floats:
    """Along the last axis, in place."""
    logits -= np.max(logits, axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= np.sum(logits, axis=-1, keepdims=True)
    return logits


def draw(p: Floats, uniform: Floats) -> Tokens:
    """Rows of probabilities (n, vocab_size), numbers in [0, 1) (n,) -> an index for each row (n,).

    By inversion: the first at which the cumulated probability reaches the number.
    """
    cdf = np.cumsum(p, axis=-1, dtype=np.float64)
    drawn: Tokens = np.argmax(cdf >= (uniform * cdf[:, -1])[:, None], axis=-1)
    return drawn
