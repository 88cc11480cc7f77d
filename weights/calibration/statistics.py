"""What a quantizer wants to know of each matrix, block by block, from activations in memory.

A calibration text is a set of windows of one length that do not see each other. Activations of all
of them are (length, n_windows, dim); the work goes a few windows at a time, so that beyond those
arrays memory holds one block's weights, its statistics and the intermediate values of _TOKENS
tokens.

The loss is the sum over all positions of the cross entropy with labels drawn from the model's own
softmax, one per position: its expected squared gradient is the diagonal of the Fisher information.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from model.config import ModelConfig
from model.reference import Floats, matvec, rms_norm
from weights.calibration.backward import rms_norm_backward
from weights.calibration.layer import Layer, backward, forward, recompute
from weights.calibration.sample import draw, softmax
from weights.parallel import in_order

_TOKENS = 1024  # per chunk: large enough for fast products, small enough for the caches
_LOGITS = 1 << 23  # per chunk of the head
_THREADS = 4  # each with a chunk and its Hessians


@dataclass(frozen=True)
class MatrixStatistics:
    """Of one matrix y = W x, (rows, cols), over the tokens t of the calibration text."""

    hessian: Floats  # (cols, cols): mean of x x^T
    gradient: Floats  # (rows,): root mean square of dL/dy
    weighted_hessian: (
        Floats | None
    )  # (cols, cols): sum w x x^T / sum w, w = |dL/dy|^2; if asked for
    mean_input: Floats  # (cols,): mean of x


def forward_layer(c: ModelConfig, layer: Layer, x: Floats) -> Floats:
    """(length, n_windows, dim) -> the same of the next block."""
    y = np.empty(x.shape, x.dtype)

    def work(windows: slice) -> None:
        part = np.ascontiguousarray(x[:, windows])
        y[:, windows] = forward(c, layer, _tokens(part), part.shape[1]).reshape(part.shape)

    deque(in_order(work, _chunks(x), _THREADS), maxlen=0)
    return y


def head_statistics(
    c: ModelConfig, norm: Floats, head: Floats, x: Floats, uniform: Floats, weighted: bool = False
) -> tuple[MatrixStatistics, Floats]:
    """The last residual (length, n_windows, dim) -> statistics of the head, dL/dx.

    `uniform` (length, n_windows) in [0, 1) draws the labels that dL/dx depends on. The head's own
    gradients need none: of a label drawn from p, E[(dL/dlogit_i)^2] = p_i (1 - p_i).
    """
    dx = np.empty(x.shape, x.dtype)
    flat_x, flat_dx, flat_uniform = _tokens(x), _tokens(dx), uniform.reshape(-1)
    moments = _Moments(head, weighted)

    def work(part: slice) -> _Moments:
        moments = _Moments(head, weighted)
        xn = rms_norm(flat_x[part], norm, c.norm_eps)
        p = softmax(matvec(head, xn))
        labels = draw(p, flat_uniform[part])
        spread = p * (1 - p)
        moments.add(xn, spread.sum(axis=0), spread.sum(axis=1), len(xn))
        del spread
        p[np.arange(len(p)), labels] -= 1  # softmax and cross entropy: dL/dlogits = p - onehot
        flat_dx[part] = rms_norm_backward(flat_x[part], norm, c.norm_eps, p @ head)
        return moments

    step = max(1, _LOGITS // len(head))
    parts = [slice(begin, begin + step) for begin in range(0, len(flat_x), step)]
    for part_moments in in_order(work, parts, _THREADS):
        moments.merge(part_moments)
    return moments.statistics(), dx


def layer_statistics(
    c: ModelConfig,
    layer: Layer,
    x: Floats,
    dy: Floats,
    weighted: bool = False,
    gradient_from: int = 0,
) -> tuple[dict[str, MatrixStatistics], Floats]:
    """A block's input and dL/d(its output), (length, n_windows, dim) -> statistics, dL/dx.

    The statistics are by the name of the `Layer`'s matrix. `gradient` counts the positions from
    `gradient_from` on.
    """
    dx = np.empty(x.shape, x.dtype)

    def fresh() -> dict[str, _Moments]:
        names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        return {name: _Moments(getattr(layer, name), weighted) for name in names}

    def work(windows: slice) -> dict[str, _Moments]:
        moments = fresh()
        part, d_part = np.ascontiguousarray(x[:, windows]), np.ascontiguousarray(dy[:, windows])
        a = recompute(c, layer, _tokens(part), part.shape[1])
        d = backward(c, layer, a, _tokens(d_part))
        first = gradient_from * part.shape[1]
        dx[:, windows] = d.x.reshape(part.shape)
        moments["qkv_proj"].add_products(a.xn, d.qkv_proj, first)
        moments["o_proj"].add_products(a.attn, d.o_proj, first)
        moments["gate_up_proj"].add_products(a.xn_mid, d.gate_up_proj, first)
        moments["down_proj"].add_products(a.hidden, d.down_proj, first)
        return moments

    moments = fresh()
    for part in in_order(work, _chunks(x), _THREADS):
        for name, part_moments in part.items():
            moments[name].merge(part_moments)
    return {name: m.statistics() for name, m in moments.items()}, dx


class _Moments:
    """Sums over tokens, from which one matrix's statistics follow.

    Hessians in the type of the activations: they will be damped by 1e-3 of their diagonal, against
    which the rounding of float32 sums over chunks, 1e-6 or so, is nothing.
    """

    def __init__(self, w: Floats, weighted: bool) -> None:
        rows, cols = w.shape
        self._n = self._n_energy = 0  # tokens in the sums over x, and in that over dL/dy
        self._xx = np.zeros((cols, cols), w.dtype)
        self._x = np.zeros(cols, np.float64)
        self._energy = np.zeros(rows, np.float64)
        self._weight = 0.0
        self._weighted_xx = np.zeros((cols, cols), w.dtype) if weighted else None

    def add_products(self, x: Floats, dy: Floats, first: int) -> None:
        """x (tokens, cols) and dL/dy (tokens, rows); `gradient` counts those from `first` on."""
        counted = dy[first:]
        rows_energy = np.einsum("tr,tr->r", counted, counted)
        self.add(x, rows_energy, np.einsum("tr,tr->t", dy, dy), len(counted))

    def add(self, x: Floats, rows_energy: Floats, tokens_energy: Floats, counted: int) -> None:
        """As `add_products`, dL/dy squared and summed over the counted tokens and over the rows."""
        self._n += len(x)
        self._n_energy += counted
        self._xx += x.T @ x
        self._x += x.sum(axis=0)
        self._energy += rows_energy
        if self._weighted_xx is not None:
            scaled = x * np.sqrt(tokens_energy)[:, None]
            self._weighted_xx += scaled.T @ scaled
            self._weight += float(tokens_energy.sum())

    def merge(self, other: _Moments) -> None:
        self._n += other._n
        self._n_energy += other._n_energy
        self._weight += other._weight
        self._xx += other._xx
        self._x += other._x
        self._energy += other._energy
        if self._weighted_xx is not None and other._weighted_xx is not None:
            self._weighted_xx += other._weighted_xx

    def statistics(self) -> MatrixStatistics:
        dtype = self._xx.dtype
        if self._weighted_xx is not None:
            self._weighted_xx /= dtype.type(self._weight)
        self._xx /= dtype.type(self._n)
        return MatrixStatistics(
            hessian=self._xx,
            gradient=np.sqrt(self._energy / self._n_energy).astype(dtype),
            weighted_hessian=self._weighted_xx,
            mean_input=(self._x / self._n).astype(dtype),
        )


def _chunks(x: Floats) -> Iterator[slice]:
    """Windows of about _TOKENS tokens, at least one at a time."""
    length, n_windows = x.shape[:2]
    step = max(1, _TOKENS // length)
    for begin in range(0, n_windows, step):
        yield slice(begin, min(begin + step, n_windows))


def _tokens(x: Floats) -> Floats:
    """(length, windows, dim) -> (tokens, dim)."""
    return x.reshape(-1, x.shape[-1])
