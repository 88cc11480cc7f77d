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
from weights.parallel import in_order

_TOKENS = 1024  # per chunk: large enough for fast products, small enough for the caches
_LOGITS = 1 << 23  # per chunk of the head
_THREADS = 4  # each with a chunk and its Hessians


@dataclass(frozen=True)
class MatrixStatistics:
    """Of one matrix y = W x, (rows, cols), over the tokens t of the calibration text.

    The weighted Hessian is there if it was asked for: sum w x x^T / sum w with w = |dL/dy|^2.
    """

    hessian: Floats  # (cols, cols): mean of x x^T
    gradient: Floats  # (rows,): root mean square of dL/dy
    weighted_hessian: Floats | None  # (cols, cols)
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

    def work(part: slice) -> _Sums:
        xn = rms_norm(flat_x[part], norm, c.norm_eps)
        p = softmax(matvec(head, xn))
        labels = draw(p, flat_uniform[part])
        spread = p * (1 - p)
        sums = _Sums.of(xn, spread.sum(axis=0), spread.sum(axis=1), len(xn), weighted)
        del spread
        p[np.arange(len(p)), labels] -= 1  # softmax and cross entropy: dL/dlogits = p - onehot
        flat_dx[part] = rms_norm_backward(flat_x[part], norm, c.norm_eps, p @ head)
        return sums

    step = max(1, _LOGITS // len(head))
    parts = [slice(begin, begin + step) for begin in range(0, len(flat_x), step)]
    return reduce(_Sums.merge, in_order(work, parts, _THREADS)).statistics(), dx


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

    def work(windows: slice) -> dict[str, _Sums]:
        part, d_part = np.ascontiguousarray(x[:, windows]), np.ascontiguousarray(dy[:, windows])
        a = recompute(c, layer, _tokens(part), part.shape[1])
        d = backward(c, layer, a, _tokens(d_part))
        dx[:, windows] = d.x.reshape(part.shape)
        first = gradient_from * part.shape[1]
        return {
            "qkv_proj": _Sums.of_products(a.xn, d.qkv_proj, first, weighted),
            "o_proj": _Sums.of_products(a.attn, d.o_proj, first, weighted),
            "gate_up_proj": _Sums.of_products(a.xn_mid, d.gate_up_proj, first, weighted),
            "down_proj": _Sums.of_products(a.hidden, d.down_proj, first, weighted),
        }

    def merge(one: dict[str, _Sums], other: dict[str, _Sums]) -> dict[str, _Sums]:
        return {name: one[name].merge(other[name]) for name in one}

    sums = reduce(merge, in_order(work, _chunks(x), _THREADS))
    return {name: of_matrix.statistics() for name, of_matrix in sums.items()}, dx


@dataclass
class _Sums:
    """Over tokens, what one matrix's statistics follow from.

    Hessians in the type of the activations: they will be damped by 1e-3 of their diagonal, against
    which the rounding of float32 sums over chunks, 1e-6 or so, is nothing.
    """

    n: int
    xx: Floats  # (cols, cols)
    x: npt.NDArray[np.float64]  # (cols,)
    n_energy: int  # tokens whose gradient counts
    energy: npt.NDArray[np.float64]  # (rows,): of (dL/dy)^2
    weight: float
    weighted_xx: Floats | None  # (cols, cols)

    @classmethod
    def of_products(cls, x: Floats, dy: Floats, first: int, weighted: bool) -> Self:
        """x (tokens, cols) and dL/dy (tokens, rows); `energy` is of the tokens from `first` on."""
        counted = dy[first:]
        rows_energy = np.einsum("tr,tr->r", counted, counted)
        return cls.of(x, rows_energy, np.einsum("tr,tr->t", dy, dy), len(counted), weighted)

    @classmethod
    def of(
        cls, x: Floats, rows_energy: Floats, tokens_energy: Floats, n_energy: int, weighted: bool
    ) -> Self:
        """x (tokens, cols), squared gradients summed over tokens (rows,) and rows (tokens,)."""
        scaled = x * np.sqrt(tokens_energy)[:, None] if weighted else None
        return cls(
            n=len(x),
            xx=x.T @ x,
            x=x.sum(axis=0, dtype=np.float64),
            n_energy=n_energy,
            energy=rows_energy.astype(np.float64),
            weight=float(tokens_energy.sum()),
            weighted_xx=None if scaled is None else scaled.T @ scaled,
        )

    def merge(self, other: _Sums) -> Self:
        """Adds the other's to these, in place."""
        self.n += other.n
        self.xx += other.xx
        self.x += other.x
        self.n_energy += other.n_energy
        self.energy += other.energy
        self.weight += other.weight
        if self.weighted_xx is not None and other.weighted_xx is not None:
            self.weighted_xx += other.weighted_xx
        return self

    def statistics(self) -> MatrixStatistics:
        dtype = self.xx.dtype
        return MatrixStatistics(
            hessian=self.xx / dtype.type(self.n),
            gradient=np.sqrt(self.energy / self.n_energy).astype(dtype),
            weighted_hessian=None
            if self.weighted_xx is None
            else self.weighted_xx / dtype.type(self.weight),
            mean_input=(self.x / self.n).astype(dtype),
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
