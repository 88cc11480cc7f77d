"""One transformer block on many texts at once: forward, and gradients back through it.

The texts are windows of one length that do not see each other. Tokens are ordered by position
first: a window's tokens are `batch` apart, and to the functions of model/reference.py the windows
are merely more heads. All functions compute in the floating type of what they are handed.

Axes: n positions, batch windows, tokens = n * batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from model.config import ModelConfig
from model.reference import Floats, attention, cache_write, matvec, rms_norm, rope, swiglu
from weights.calibration.backward import (
    attention_backward,
    rms_norm_backward,
    rope_backward,
    swiglu_backward,
)
from weights.sources import Source

# Attention scores that are looked at together; they and their gradients take some four arrays.
_SCORES = 1 << 22

Product = Callable[[Floats, Floats], Floats]  # (rows, cols), (tokens, cols) -> (tokens, rows)


@dataclass(frozen=True)
class Layer:
    """A block's weights, dense; the fused matrices as in a weights file. And what is its own of
    what a family adds to a Llama.
    """

    input_norm: Floats
    qkv_proj: Floats
    o_proj: Floats
    post_norm: Floats
    gate_up_proj: Floats
    down_proj: Floats
    is_rotated: bool = True
    window: int | None = None
    qkv_bias: Floats | None = None
    q_norm: Floats | None = None
    k_norm: Floats | None = None

    @classmethod
    def read(cls, source: Source, index: int) -> Self:
        """From the source, tensor by tensor."""

        def stacked(*names: str) -> Floats:
            parts = [source.read(f"model.layers.{index}.{name}.weight") for name in names]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)

        def vector(name: str, there: bool) -> Floats | None:
            return source.vector(f"model.layers.{index}.self_attn.{name}") if there else None

        c = source.config
        return cls(
            input_norm=stacked("input_layernorm"),
            qkv_proj=stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            o_proj=stacked("self_attn.o_proj"),
            post_norm=stacked("post_attention_layernorm"),
            gate_up_proj=stacked("mlp.gate_proj", "mlp.up_proj"),
            down_proj=stacked("mlp.down_proj"),
            is_rotated=c.is_rotated(index),
            window=c.window(index),
            qkv_bias=vector("qkv_proj.bias", c.qkv_bias),
            q_norm=vector("q_norm.weight", c.qk_norm),
            k_norm=vector("k_norm.weight", c.qk_norm),
        )


@dataclass(frozen=True)
class Activations:
    """What the way forward leaves behind, enough to go back: (tokens, ...) each."""

    x: Floats  # the block's input
    xn: Floats  # what qkv_proj reads
    q_raw: Floats  # as q and k, before their norm and their rotation
    k_raw: Floats
    q: Floats  # (n, batch * n_heads, head_dim)
    k: Floats  # (n, batch * n_kv_heads, head_dim)
    v: Floats  # (n, batch * n_kv_heads, head_dim)
    attn: Floats  # what o_proj reads
    x_mid: Floats  # the residual between attention and feed-forward
    xn_mid: Floats  # what gate_up_proj reads
    gate_up: Floats
    hidden: Floats  # what down_proj reads


@dataclass(frozen=True)
class Gradients:
    """dL/dy of every matrix's own output, (tokens, rows) each, and dL/dx of the block's input."""

    qkv_proj: Floats  # before bias, norms and RoPE
    o_proj: Floats
    gate_up_proj: Floats
    down_proj: Floats
    x: Floats  # (tokens, dim)


def activate(
    c: ModelConfig,
    layer: Layer,
    x: Floats,
    k_cache: Floats,
    v_cache: Floats,
    pos: int = 0,
    product: Product = matvec,
) -> Activations:
    """x (tokens, dim) at positions pos, pos + 1, ...; all but the product with down_proj.

    The caches are (positions, batch * n_kv_heads, head_dim); keys and values are added at `pos`.
    """
    xn = rms_norm(x, layer.input_norm, c.norm_eps)
    heads, attn = _attend(c, layer, xn, k_cache, v_cache, pos, product)
    x_mid = x + product(layer.o_proj, attn)

    xn_mid = rms_norm(x_mid, layer.post_norm, c.norm_eps)
    gate_up = product(layer.gate_up_proj, xn_mid)
    return Activations(x, xn, *heads, attn, x_mid, xn_mid, gate_up, swiglu(gate_up))


def attend(c: ModelConfig, layer: Layer, xn: Floats, batch: int) -> Floats:
    """What qkv_proj reads of whole windows, (tokens, dim), to what o_proj reads (tokens, q_dim)."""
    return _attend(c, layer, xn, *_fresh_cache(c, xn, batch))[1]


def output(layer: Layer, a: Activations, product: Product = matvec) -> Floats:
    """The block's output, (tokens, dim)."""
    return a.x_mid + product(layer.down_proj, a.hidden)


def forward(c: ModelConfig, layer: Layer, x: Floats, batch: int) -> Floats:
    """A block on whole windows: x (tokens, dim) from position 0 -> (tokens, dim)."""
    return output(layer, activate(c, layer, x, *_fresh_cache(c, x, batch)))


def backward(c: ModelConfig, layer: Layer, a: Activations, dy: Floats) -> Gradients:
    """dL/d(output) of whole windows, (tokens, dim), to all the gradients inside the block."""
    n = len(a.q)
    batch = a.q.shape[1] // c.n_heads
    # y = W x  =>  dL/dx = W^T dL/dy; a residual's gradient is the sum over its two ways.
    d_gate_up = swiglu_backward(a.gate_up, dy @ layer.down_proj)
    dx_mid = dy + rms_norm_backward(
        a.x_mid, layer.post_norm, c.norm_eps, d_gate_up @ layer.gate_up_proj
    )

    d_attn = (dx_mid @ layer.o_proj).reshape(a.q.shape)
    dq, dk, dv = np.empty_like(a.q), np.empty_like(a.k), np.empty_like(a.v)
    for heads, kv_heads in _head_groups(c, batch, n, n):
        dq[:, heads], dk[:, kv_heads], dv[:, kv_heads] = attention_backward(
            a.q[:, heads],
            a.k[:, kv_heads],
            a.v[:, kv_heads],
            d_attn[:, heads],
            c.score_scale,
            layer.window,
        )
    if layer.is_rotated:
        dq, dk = (rope_backward(each, c.rope_theta, c.rope_divisors) for each in (dq, dk))
    dq, dk = (
        each if norm is None else rms_norm_backward(raw, norm, c.norm_eps, each)
        for each, norm, raw in ((dq, layer.q_norm, a.q_raw), (dk, layer.k_norm, a.k_raw))
    )
    d_qkv = np.concatenate(
        [d.reshape(n, batch, -1, c.head_dim) for d in (dq, dk, dv)], axis=2
    ).reshape(len(dy), -1)
    dx = dx_mid + rms_norm_backward(a.x, layer.input_norm, c.norm_eps, d_qkv @ layer.qkv_proj)
    return Gradients(qkv_proj=d_qkv, o_proj=dx_mid, gate_up_proj=d_gate_up, down_proj=dy, x=dx)


def recompute(c: ModelConfig, layer: Layer, x: Floats, batch: int) -> Activations:
    """`activate` on whole windows, for `backward`."""
    return activate(c, layer, x, *_fresh_cache(c, x, batch))


def _attend(
    c: ModelConfig,
    layer: Layer,
    xn: Floats,
    k_cache: Floats,
    v_cache: Floats,
    pos: int = 0,
    product: Product = matvec,
) -> tuple[tuple[Floats, Floats, Floats, Floats, Floats], Floats]:
    """`activate` from qkv_proj to attention: q_raw, k_raw, q, k, v; attn."""
    batch = k_cache.shape[1] // c.n_kv_heads
    n = len(xn) // batch
    qkv = product(layer.qkv_proj, xn)
    if layer.qkv_bias is not None:
        qkv = qkv + layer.qkv_bias
    q_raw, k_raw, v = _split_heads(c, qkv, n, batch)
    q, k = (
        each if norm is None else rms_norm(each, norm, c.norm_eps)
        for each, norm in ((q_raw, layer.q_norm), (k_raw, layer.k_norm))
    )
    if layer.is_rotated:
        q, k = (rope(each, pos, c.rope_theta, c.rope_divisors) for each in (q, k))
    cache_write(k_cache, v_cache, k, v, pos)

    attn = np.empty_like(q)
    for heads, kv_heads in _head_groups(c, batch, n, pos + n):
        mixed = attention(
            q[:, heads],
            k_cache[:, kv_heads],
            v_cache[:, kv_heads],
            pos,
            c.score_scale,
            layer.window,
        )
        attn[:, heads] = mixed.reshape(n, -1, c.head_dim)
    return (q_raw, k_raw, q, k, v), attn.reshape(len(xn), c.q_dim)


def _fresh_cache(c: ModelConfig, x: Floats, batch: int) -> tuple[Floats, Floats]:
    shape = (len(x) // batch, batch * c.n_kv_heads, c.head_dim)
    return np.empty(shape, x.dtype), np.empty(shape, x.dtype)


def _split_heads(c: ModelConfig, qkv: Floats, n: int, batch: int) -> tuple[Floats, Floats, Floats]:
    """(tokens, q | k | v) -> three of (n, batch * heads, head_dim)."""
    parts = np.split(
        qkv.reshape(n, batch, -1, c.head_dim), (c.n_heads, c.n_heads + c.n_kv_heads), axis=2
    )
    q, k, v = (part.reshape(n, -1, c.head_dim) for part in parts)
    return q, k, v


def _head_groups(c: ModelConfig, batch: int, n: int, n_pos: int) -> Iterator[tuple[slice, slice]]:
    """Slices of query heads and of the key heads that they share, of at most _SCORES scores."""
    group = c.n_heads // c.n_kv_heads
    step = max(1, _SCORES // (group * n * n_pos))
    for begin in range(0, batch * c.n_kv_heads, step):
        end = min(begin + step, batch * c.n_kv_heads)
        yield slice(begin * group, end * group), slice(begin, end)
