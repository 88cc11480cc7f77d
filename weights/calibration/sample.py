"""Calibration text by the model itself: many texts sampled at once, in numpy.

Needs the whole model in float32 in memory, as nothing else here does.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.errors import EngineError
from engine.tokenizer import Tokenizer
from model.reference import Floats, Integers, embed, matvec, rms_norm
from weights.calibration.layer import Layer, activate, output
from weights.layout import EMBEDDING, HEAD
from weights.sources import Source

Tokens = npt.NDArray[np.int64]


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
    rng = np.random.default_rng(seed)
    document, chat = _document_opening(source), _chat_opening(source)
    is_chat = [bool(chat) and i % 2 == 0 for i in range(n_sequences)]
    forced = [list(chat if chats else document) for chats in is_chat]  # what is to come first
    model = BatchedLlama(source, n_sequences, length)
    tokens = np.empty((n_sequences, length), np.int64)
    tokens[:, 0] = rng.integers(source.config.vocab_size, size=n_sequences)
    for pos in range(length):
        if pos > 0:
            logits = model.step(tokens[:, pos - 1])
            logits /= temperature
            tokens[:, pos] = draw(softmax(logits), rng.random(n_sequences))
        for i, opening in enumerate(forced):
            if opening:
                tokens[i, pos] = opening.pop(0)
            elif tokens[i, pos] in source.config.eos_token_ids and not is_chat[i]:
                opening += document
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


class BatchedLlama:
    """A model that reads one token of each of `batch` texts at a time, with a cache for each."""

    def __init__(self, source: Source, batch: int, length: int) -> None:
        c = self.config = source.config
        self._layers = [Layer.read(source, i) for i in range(c.n_layers)]
        self._norm = source.tensors["model.norm.weight"].read()
        self._embedding = source.tensors[f"{EMBEDDING}.weight"].read()
        self._head = (
            self._embedding if c.tie_embeddings else source.tensors[f"{HEAD}.weight"].read()
        )
        self._pos = 0
        shape = (c.n_layers, length, batch * c.n_kv_heads, c.head_dim)
        self._k_cache = np.empty(shape, self._embedding.dtype)
        self._v_cache = np.empty(shape, self._embedding.dtype)

    def step(self, token_ids: Integers) -> Floats:
        """The next token of each text, (batch,) -> logits (batch, vocab_size)."""
        x = embed(self._embedding, token_ids)
        for layer, k_cache, v_cache in zip(self._layers, self._k_cache, self._v_cache, strict=True):
            x = output(layer, activate(self.config, layer, x, k_cache, v_cache, self._pos))
        self._pos += 1
        return matvec(self._head, rms_norm(x, self._norm, self.config.norm_eps))


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
