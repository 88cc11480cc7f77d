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
from functools import reduce
from typing import Self

import numpy as np
import numpy.typing as npt

from model.config import ModelConfig
from model.reference import Floats, matvec, rms_norm
from weights.calibration.backward import rms_norm_backward
from weights.calibration.layer import Layer, backward, forward, recompute
from weights.calibration.sample import draw, softmax
from weights.parallel import in_order, memory_bytes

_TOKENS = 1024  # per chunk: large enough for fast products, small enough for the caches
_LOGITS = 1 << 23  # per chunk of the head
_THREADS = 4  # each with a chunk and its Hessians; more where these take little of the memory


@dataclass(frozen=True)
class MatrixStatistics:
    """Of one matrix y = W x, (rows, cols), over the tokens of the calibration text."""

    hessian: Floats  # (cols, cols): mean of x x^T
    gradient: Floats  # (rows,): root mean square of dL/dy


def forward_layer(c: ModelConfig, layer: Layer, x: Floats) -> Floats:
    """(length, n_windows, dim) -> the same of the next block."""
    y = np.empty(x.shape, x.dtype)

    def work(windows: slice) -> None:
        part = np.ascontiguousarray(x[:, windows])
        y[:, windows] = forward(c, layer, _tokens(part), part.shape[1]).reshape(part.shape)

    deque(in_order(work, _chunks(x)), maxlen=0)
    return y


def head_statistics(
    c: ModelConfig, norm: Floats, head: Floats, x: Floats, uniform: Floats
) -> tuple[MatrixStatistics, Floats]:
    """The last residual (length, n_windows, dim) -> statistics of the head, dL/dx.

    `uniform` (length, n_windows) in [0, 1) draws the labels that dL/dx depends on. The head's own
    gradients need none: of a label drawn from p, E[(dL/dlogit_i)^2] = p_i (1 - p_i).
    """
    dx = np.empty(x.shape, x.dtype)
    flat_x, flat_dx, flat_uniform = _tokens(x), _tokens(dx), uniform.reshape(-1)

    def work(part: slice) -> _Sums:
        xn = rms_norm(flat_x[part], norm, c.norm_eps)
        p = softmax(matvec(head, xn))
        labels = draw(p, flat_uniform[part])
        sums = _Sums.of(xn, np.einsum("tr,tr->r", p, 1 - p))
        p[np.arange(len(p)), labels] -= 1  # softmax and cross entropy: dL/dlogits = p - onehot
        flat_dx[part] = rms_norm_backward(flat_x[part], norm, c.norm_eps, p @ head)
        return sums

    step = max(1, _LOGITS // len(head))
    parts = [slice(begin, begin + step) for begin in range(0, len(flat_x), step)]
    return reduce(_Sums.merge, in_order(work, parts, threads_for(c.dim))).statistics(), dx


def layer_statistics(
    c: ModelConfig, layer: Layer, x: Floats, dy: Floats
) -> tuple[dict[str, MatrixStatistics], Floats]:
    """A block's input and dL/d(its output), (length, n_windows, dim) -> statistics, dL/dx.

    The statistics are by the name of the `Layer`'s matrix.
    """
    dx = np.empty(x.shape, x.dtype)

    def work(windows: slice) -> dict[str, _Sums]:
        part, d_part = np.ascontiguousarray(x[:, windows]), np.ascontiguousarray(dy[:, windows])
        a = recompute(c, layer, _tokens(part), part.shape[1])
        d = backward(c, layer, a, _tokens(d_part))
        dx[:, windows] = d.x.reshape(part.shape)
        products = {
            "qkv_proj": (a.xn, d.qkv_proj),
            "o_proj": (a.attn, d.o_proj),
            "gate_up_proj": (a.xn_mid, d.gate_up_proj),
            "down_proj": (a.hidden, d.down_proj),
        }
        return {
            name: _Sums.of(of_x, np.einsum("tr,tr->r", of_y, of_y))
            for name, (of_x, of_y) in products.items()
        }

    def merge(one: dict[str, _Sums], other: dict[str, _Sums]) -> dict[str, _Sums]:
        return {name: one[name].merge(other[name]) for name in one}

    threads = threads_for(c.dim, c.q_dim, c.dim, c.hidden_dim)
    sums = reduce(merge, in_order(work, _chunks(x), threads))
    return {name: of_matrix.statistics() for name, of_matrix in sums.items()}, dx


@dataclass
class _Sums:
    """Over tokens, what one matrix's statistics follow from.

    Hessians in the type of the activations: they will be damped by a few hundredths of their
    diagonal, against which the rounding of float32 sums over chunks, 1e-6 or so, is nothing.
    """

    n: int
    xx: Floats  # (cols, cols)
    energy: npt.NDArray[np.float64]  # (rows,): of (dL/dy)^2

    @classmethod
    def of(cls, x: Floats, energy: Floats) -> Self:
        """x (tokens, cols) and the squared gradients summed over tokens (rows,)."""
        return cls(len(x), x.T @ x, energy.astype(np.float64))

    def merge(self, other: _Sums) -> Self:
        """Adds the other's to these, in place."""
        self.n += other.n
        self.xx += other.xx
        self.energy += other.energy
        return self

    def statistics(self) -> MatrixStatistics:
        dtype = self.xx.dtype
        return MatrixStatistics(
            hessian=self.xx / dtype.type(self.n),
            gradient=np.sqrt(self.energy / self.n).astype(dtype),
        )


def threads_for(*cols: int) -> int:
    """How many threads, at most: with as many results waiting, Hessians of these sizes take an
    eighth of the memory.
    """
    return max(_THREADS, memory_bytes() // 16 // sum(4 * n * n for n in cols))


def _chunks(x: Floats) -> Iterator[slice]:
    """Windows of about _TOKENS tokens, at least one at a time."""
    length, n_windows = x.shape[:2]
    step = max(1, _TOKENS // length)
    for begin in range(0, n_windows, step):
        yield slice(begin, min(begin + step, n_windows))


def _tokens(x: Floats) -> Floats:
    """(length, windows, dim) -> (tokens, dim)."""
    return x.reshape(-1, x.shape[-1])
