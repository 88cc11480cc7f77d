"""How far models are from a reference on a text: the arithmetic of a comparison.

Models are functions from tokens to logits. A text is cut into windows that do not see each other;
the logits of one window are held at a time, the reference's once for all models.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from weights.parallel import in_order

Array = npt.NDArray[np.float64]
Logits = Callable[[Sequence[int]], npt.NDArray[Any]]  # token ids (n,) -> (n, vocab_size)

_ROWS = 4  # compared at a time: in float64 they still fit the processor's cache

# Tokens that stand for one observation in the standard error, for neighbours are alike. On a book,
# a model of 5 bits: 0.0008 if tokens were independent, 0.0012 with stretches of 32, 0.0016 with
# 128, 0.0017 with 256, 0.0014 with 512, of which there are too few.
_STRETCH = 128


@dataclass(frozen=True)
class Model:
    """What is judged, and perhaps the same weights with the other kind of activations."""

    logits: Logits
    exact: bool = False  # float32 activations, else int8 ones; asked only where there is a twin
    twin: Logits | None = None


@dataclass(frozen=True)
class Comparison:
    """KL is KL(reference || model) in nats at one position, given the window up to there."""

    tokens: int  # positions that were compared
    perplexity: float
    reference_perplexity: float
    kl_mean: float
    kl_standard_error: float | None  # of kl_mean; None: the text is too short to tell
    kl_p99: float  # 99th percentile over the positions
    top1_agreement: float  # share of the positions at which both have the same best token


@dataclass(frozen=True)
class Verdict:
    against_reference: Comparison
    int8_against_exact: Comparison | None  # of the same weights, where the model has a twin


def compare(
    models: Sequence[Model],
    reference: Logits,
    token_ids: Sequence[int],
    window: int,
    seen: Callable[[Sequence[float]], None] = lambda kl: None,
) -> list[Verdict]:
    """All models on a text of at least 2 tokens, in windows of at least 2.

    `seen` hears after each window the mean KL of each model up to there.
    """
    tallies = [Tally() for _ in models]
    twins = [Tally() for _ in models]
    for ids in windows(token_ids, window):
        theirs = reference(ids)
        for model, tally, twin in zip(models, tallies, twins, strict=True):
            ours = model.logits(ids)
            tally.add(theirs, ours, ids)
            if model.twin is not None:
                other = model.twin(ids)
                exact, int8 = (ours, other) if model.exact else (other, ours)
                twin.add(exact, int8, ids)
        seen([tally.kl_mean for tally in tallies])
    return [
        Verdict(tally.result(), twin.result() if model.twin is not None else None)
        for model, tally, twin in zip(models, tallies, twins, strict=True)
    ]


def windows(token_ids: Sequence[int], window: int) -> Iterator[list[int]]:
    """A last window of one token predicts nothing and is left out."""
    for begin in range(0, len(token_ids) - 1, window):
        yield list(token_ids[begin : begin + window])


class Tally:
    """What a comparison has seen of a text so far."""

    def __init__(self) -> None:
        self._kl: list[Array] = []  # of each window: (n,)
        self._agree: list[npt.NDArray[np.bool_]] = []  # (n,)
        self._nll: list[Array] = []  # (2, n - 1): of the reference and of the model

    def add(
        self, reference: npt.NDArray[Any], model: npt.NDArray[Any], token_ids: Sequence[int]
    ) -> None:
        """The logits (n, vocab_size) of both after each of a window's n tokens."""
        n = len(token_ids)
        kl, agree, nll = np.empty(n), np.empty(n, np.bool_), np.empty((2, n))
        # The window's last token has no successor; its column is dropped below.
        following = np.append(token_ids[1:], 0)

        def work(begin: int) -> None:
            part = slice(begin, begin + _ROWS)
            p, q = log_softmax(reference[part]), log_softmax(model[part])
            rows = np.arange(len(p))
            nll[:, part] = -p[rows, following[part]], -q[rows, following[part]]
            agree[part] = p.argmax(axis=-1) == q.argmax(axis=-1)
            np.subtract(p, q, out=q)
            kl[part] = np.einsum("nv,nv->n", np.exp(p, out=p), q)

        deque(in_order(work, range(0, n, _ROWS)), maxlen=0)
        self._kl.append(kl)
        self._agree.append(agree)
        self._nll.append(nll[:, :-1])

    @property
    def kl_mean(self) -> float:
        """Over the tokens so far."""
        return float(np.concatenate(self._kl).mean())

    def result(self) -> Comparison:
        kl = np.concatenate(self._kl)
        stretches = [
            part
            for window in self._kl
            for part in np.split(window, range(_STRETCH, len(window), _STRETCH))
        ]
        of_reference, of_model = np.exp(np.concatenate(self._nll, axis=1).mean(axis=1))
        return Comparison(
            tokens=kl.size,
            perplexity=float(of_model),
            reference_perplexity=float(of_reference),
            kl_mean=self.kl_mean,
            kl_standard_error=standard_error(stretches),
            kl_p99=float(np.percentile(kl, 99)),
            top1_agreement=float(np.concatenate(self._agree).mean()),
        )


def log_softmax(logits: npt.NDArray[Any]) -> Array:
    """Along the last axis; in float64, because differences of close distributions are looked at."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def standard_error(clusters: Sequence[Array]) -> float | None:
    """Of the mean over the n elements of W clusters; those of one cluster may depend on each other.

    sqrt(W / (W - 1) * sum_w (sum(x_w) - n_w * mean)^2) / n, as for a ratio estimated from clusters
    of unequal sizes [Cochran 1977, chapter 9A]. None: one cluster tells nothing.
    """
    n_clusters = len(clusters)
    if n_clusters < 2:
        return None
    sizes = np.array([cluster.size for cluster in clusters])
    sums = np.array([cluster.sum() for cluster in clusters])
    residuals = sums - sizes * (sums.sum() / sizes.sum())
    spread = n_clusters / (n_clusters - 1) * np.square(residuals).sum()
    return float(np.sqrt(spread) / sizes.sum())
