"""Gradients of a Llama's operations with respect to their inputs: the twins of model/reference.py.

One function per operation, dL/d(output) to dL/d(input), in the floating type that it is handed.
Gradients of weights are not needed anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from model.reference import Floats, rope, visible


def rms_norm_backward(x: Floats, weight: Floats, eps: float, dy: Floats) -> Floats:
    """(..., dim): with r = 1 / sqrt(mean(x^2) + eps) and g = dy * weight,

    dx = r * (g - x * r^2 * mean(g * x)).
    """
    r = 1 / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + x.dtype.type(eps))
    g = dy * weight
    dx: Floats = r * (g - x * (r * r * np.mean(g * x, axis=-1, keepdims=True)))
    return dx


def rope_backward(dy: Floats, theta: float, divisors: Sequence[float] = ()) -> Floats:
    """(n, heads, head_dim) at positions 0, 1, ...: rotated back by the same angles.

    A rotation of (a, b) by the negative angle is one of (b, a) by the angle.
    """
    half = dy.shape[-1] // 2
    return np.roll(rope(np.roll(dy, half, axis=-1), 0, theta, divisors), half, axis=-1)


def attention_backward(
    q: Floats,
    k: Floats,
    v: Floats,
    d_mixed: Floats,
    scale: float | None = None,
    window: int | None = None,
) -> tuple[Floats, Floats, Floats]:
    """Of `attention` from position 0: (n, n_heads, ...) q, d_mixed, (n, n_kv_heads, ...) k, v.

    With P = softmax(S), S = scale q k^T over the positions that the token sees:
    dv = P^T d_mixed, dP = d_mixed v^T, dS = P * (dP - rowsum(P * dP)),
    dq = scale dS k, dk = scale dS^T q; dk and dv are sums over the query
    heads that share them.
    """
    n, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[1]
    factor = q.dtype.type(head_dim**-0.5 if scale is None else scale)
    q, d_mixed = (
        t.reshape(n, n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3) for t in (q, d_mixed)
    )  # (n_kv_heads, group, n, head_dim)
    k, v = k.transpose(1, 0, 2)[:, None], v.transpose(1, 0, 2)[:, None]  # (n_kv_heads, 1, n, ...)

    p = q @ k.swapaxes(-1, -2)  # (n_kv_heads, group, n, n)
    p *= factor
    p += np.where(
        visible(np.arange(n)[:, None], np.arange(n), window), q.dtype.type(0), q.dtype.type(-np.inf)
    )
    p -= np.max(p, axis=-1, keepdims=True)
    np.exp(p, out=p)
    p /= np.sum(p, axis=-1, keepdims=True)
    dv = np.sum(p.swapaxes(-1, -2) @ d_mixed, axis=1)  # (n_kv_heads, n, head_dim)

    ds = d_mixed @ v.swapaxes(-1, -2)
    ds -= np.einsum("hgij,hgij->hgi", p, ds)[..., None]
    ds *= p
    ds *= factor
    dq = ds @ k  # (n_kv_heads, group, n, head_dim)
    dk = np.sum(ds.swapaxes(-1, -2) @ q, axis=1)
    return (
        dq.transpose(2, 0, 1, 3).reshape(n, n_heads, head_dim),
        dk.transpose(1, 0, 2),
        dv.transpose(1, 0, 2),
    )


def swiglu_backward(gate_up: Floats, dy: Floats) -> Floats:
    """(..., gate | up), (..., hidden_dim) -> (..., gate | up): with s = sigmoid(gate),

    d_gate = dy * up * s * (1 + gate * (1 - s)), d_up = dy * gate * s.
    """
    gate, up = np.split(gate_up, 2, axis=-1)
    decay = np.exp(-np.abs(gate))  # at most 1, where exp(-gate) would overflow below -88
    s = np.where(gate < 0, decay, 1) / (1 + decay)
    d_gate = dy * up * s * (1 + gate * (1 - s))
    return np.concatenate([d_gate, dy * gate * s], axis=-1)
