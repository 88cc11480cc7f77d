"""The engine's arithmetic in numpy: what each kernel must compute, and the whole model made of it.

One function per kernel, under the kernel's name. A function computes in the floating type that it
is handed: float32 as the engine does, float64 where the result serves as truth. Weights arrive as
dense arrays; nothing here decodes streams or touches the GPU.

Axes: n tokens, or any leading axes `...`; a matrix is (rows, cols) = (out, in) and y = W x.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from codec.lossless import to_floats
from model.config import ModelConfig
from weights import layout
from weights.sources import Source
from weights.store import WeightsFile

if TYPE_CHECKING:  # the oracle itself needs no GPU library
    from engine.sampler import Sampling

Floats = npt.NDArray[np.floating[Any]]
Integers = npt.NDArray[np.integer[Any]]

ACTIVATION_BLOCK = 32  # columns that share one int8 scale

_QUERY_BLOCK = 64  # tokens whose scores are held at a time: they fit the processor's cache


def embed(table: Floats, token_ids: Integers) -> Floats:
    """(vocab_size, dim), (n,) -> (n, dim): one row of the table per token."""
    return table[token_ids]


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """(..., dim) -> (..., dim): x / sqrt(mean(x^2) + eps) * weight [Zhang 2019, eq. 4]."""
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    xn: Floats = x / np.sqrt(mean_square + x.dtype.type(eps)) * weight
    return xn


def quantize_activations(x: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """(..., cols) -> int8 (..., 32 * n_blocks) and scale (..., n_blocks): x ~= scale * int8.

    In each block of 32 columns scale = max|x| / 127 and int8 = x / scale, rounded half to even.
    Columns beyond `cols` are zeros; a block of zeros has scale 0.
    """
    cols = x.shape[-1]
    n_blocks = -(-cols // ACTIVATION_BLOCK)
    padded = np.zeros((*x.shape[:-1], n_blocks * ACTIVATION_BLOCK), x.dtype)
    padded[..., :cols] = x
    blocks = padded.reshape(*x.shape[:-1], n_blocks, ACTIVATION_BLOCK)
    scale = np.max(np.abs(blocks), axis=-1) / x.dtype.type(127)
    divisor = np.where(scale > 0, scale, x.dtype.type(1))[..., None]
    return np.rint(blocks / divisor).astype(np.int8).reshape(padded.shape), scale


def dequantize_activations(x_int: npt.NDArray[np.int8], x_scale: Floats, cols: int) -> Floats:
    """What `quantize_activations` kept of x: (..., cols), in the scale's type."""
    x = x_int.astype(x_scale.dtype) * np.repeat(x_scale, ACTIVATION_BLOCK, axis=-1)
    return x[..., :cols]


def matvec(w: Floats, x: Floats) -> Floats:
    """(rows, cols), (..., cols) -> (..., rows): y = W x."""
    return x @ w.T


def matvec_int8(
    w_int: Integers, row_scale: Floats, x_int: npt.NDArray[np.int8], x_scale: Floats
) -> Floats:
    """Integer weights (rows, cols), scale (rows,), `quantize_activations` of x -> (..., rows).

    y[r] = row_scale[r] * sum_b x_scale[b] * sum_j w_int[r, 32 b + j] * x_int[32 b + j].
    The inner sum is exact; the outer one goes through the blocks in order, in the type of x_scale.
    """
    rows, cols = w_int.shape
    y: Floats = np.zeros((*x_int.shape[:-1], rows), x_scale.dtype)
    for b, start in enumerate(range(0, cols, ACTIVATION_BLOCK)):
        block = slice(start, min(start + ACTIVATION_BLOCK, cols))
        dots = x_int[..., block].astype(np.int64) @ w_int[:, block].astype(np.int64).T
        y += dots.astype(y.dtype) * x_scale[..., b : b + 1]
    y *= row_scale
    return y


def rope(x: Floats, pos: int, theta: float, divisors: Sequence[float] = ()) -> Floats:
    """(n, heads, head_dim) at positions pos, pos + 1, ... -> the same shape, rotated.

    `divisors`, if any, are what the head_dim / 2 frequencies are divided by.

    Pair i is (i, i + head_dim/2), as Hugging Face stores it: RoFormer eq. 34 up to a permutation.
    Angles are float64 whatever x is; in float32 they would be off by up to position * 2^-24.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-np.arange(half) / half) / (np.array(divisors) if divisors else 1)
    angles = np.arange(pos, pos + len(x))[:, None, None] * frequencies  # (n, 1, half)
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def qkv_heads(c: ModelConfig, qkv: Floats, bias: Floats | None, norms: Sequence[Floats]) -> Floats:
    """(n, rows of q | k | v) -> the heads (n, heads, head_dim): with the bias (rows,) if any, and
    the heads of q and of k, not those of v, through RMSNorms of `norms` (head_dim,), if any.
    """
    if bias is not None:
        qkv = qkv + bias
    heads = qkv.reshape(len(qkv), -1, c.head_dim)
    if not norms:
        return heads
    q, k, v = np.split(heads, (c.n_heads, c.n_heads + c.n_kv_heads), axis=1)
    normed = [rms_norm(x, w, c.norm_eps) for x, w in zip((q, k), norms, strict=True)]
    return np.concatenate([*normed, v], axis=1)


def cache_write(k_cache: Floats, v_cache: Floats, k: Floats, v: Floats, pos: int) -> None:
    """Stores keys and values (n, n_kv_heads, head_dim) at `pos`, rounded to the cache's type."""
    k_cache[pos : pos + len(k)] = k
    v_cache[pos : pos + len(v)] = v


def quantize_cache(x: Floats, bits: int) -> tuple[Integers, Floats]:
    """Heads (..., head_dim) as the cache keeps them in 8 bits, or halves of them in 4: integers,
    and their scale (...): the largest is 127 or 7 of it.
    """
    top = (1 << (bits - 1)) - 1
    scale = np.max(np.abs(x), axis=-1) / x.dtype.type(top)
    divisor = np.where(scale > 0, scale, x.dtype.type(1))[..., None]
    return np.rint(x / divisor).astype(np.int8), scale


def cached(x: Floats, bits: int) -> Floats:
    """What a cache of so many bits gives back of heads (..., head_dim); above 8 all of it."""
    if bits > 8:
        return x
    parts = x.reshape(*x.shape[:-1], 2 if bits == 4 else 1, -1)
    q, scale = quantize_cache(parts, bits)
    return (q.astype(x.dtype) * scale[..., None]).reshape(x.shape)


def attention(
    q: Floats,
    k_cache: Floats,
    v_cache: Floats,
    pos: int,
    scale: float | None = None,
    window: int | None = None,
) -> Floats:
    """(n, n_heads, head_dim) at positions pos, pos + 1, ... -> (n, n_heads * head_dim).

    softmax(scale q k) v, scale = 1 / sqrt(head_dim) by default, over the cached positions up to the
    token's own: the last `window` of them, or all. The caches are (positions, n_kv_heads,
    head_dim); n_heads / n_kv_heads neighbouring heads share a key head.
    """
    n, n_heads, head_dim = q.shape
    n_pos, n_kv_heads = pos + n, k_cache.shape[1]
    q = q.reshape(n, n_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)  # (n_kv_heads, group, n, ...)
    k, v = (cache[:n_pos].astype(q.dtype, copy=False) for cache in (k_cache, v_cache))
    k = k.transpose(1, 2, 0)[:, None]  # (n_kv_heads, 1, head_dim, n_pos)
    v = v.transpose(1, 0, 2)[:, None]  # (n_kv_heads, 1, n_pos, head_dim)

    mixed = np.empty_like(q)
    for begin in range(0, n, _QUERY_BLOCK):
        block = slice(begin, begin + _QUERY_BLOCK)
        own = np.arange(pos, n_pos)[block, None]  # positions of these tokens
        seen = own[-1, 0] + 1  # by the last of them
        scores = q[:, :, block] @ k[..., :seen]  # (n_kv_heads, group, block, seen)
        scores *= q.dtype.type(head_dim**-0.5 if scale is None else scale)
        np.copyto(scores, -np.inf, where=~visible(own, np.arange(seen), window))
        scores -= np.max(scores, axis=-1, keepdims=True)
        weights = np.exp(scores, out=scores)
        mixed[:, :, block] = weights @ v[:, :, :seen] / np.sum(weights, axis=-1, keepdims=True)
    return mixed.transpose(2, 0, 1, 3).reshape(n, n_heads * head_dim)


def visible(own: Integers, other: Integers, window: int | None) -> npt.NDArray[np.bool_]:
    """Whether a token at position `own` sees position `other`; broadcast."""
    seen: npt.NDArray[np.bool_] = other <= own
    return seen if window is None else seen & (other > own - window)


def swiglu(gate_up: Floats) -> Floats:
    """(..., gate | up) -> (..., hidden_dim): silu(gate) * up [Shazeer 2020, eq. 5]."""
    gate, up = np.split(gate_up, 2, axis=-1)
    with np.errstate(over="ignore"):  # below -88 float32's exp(-gate) is infinite, and silu 0
        y: Floats = gate / (1 + np.exp(-gate)) * up
    return y


def sampling_support(logits: Floats, sampling: Sampling) -> Integers:
    """(vocab_size,) -> the tokens that temperature > 0, top_k, top_p and min_p leave to be drawn.

    By sorting, where the kernel searches for the threshold; equal logits are in or out together.
    """
    scaled = logits.astype(np.float64) / sampling.temperature
    least = -np.inf
    if 0 < sampling.top_k < scaled.size:
        least = np.partition(scaled, -sampling.top_k)[-sampling.top_k]
    if sampling.top_p < 1:
        best_first = np.sort(scaled[scaled >= least])[::-1]
        weights = np.exp(best_first - best_first[0])
        enough = np.cumsum(weights) >= sampling.top_p * weights.sum()
        least = best_first[np.argmax(enough)]
    if sampling.min_p > 0:
        least = max(least, scaled.max() + np.log(sampling.min_p))
    return np.flatnonzero(scaled >= least)


def sampling_scores(logits: Floats, sampling: Sampling, pos: int) -> Floats:
    """(vocab_size,) -> what the token at position `pos` is the argmax of: logits if greedy.

    Otherwise logit / temperature + Gumbel noise, -inf outside the support. The noise is a hash of
    (seed, pos, token) as the kernel computes it.
    """
    if sampling.temperature == 0:
        return logits
    support = sampling_support(logits, sampling)
    hashed = _pcg(support.astype(np.uint32) ^ _pcg(np.uint32(pos) ^ _pcg(np.uint32(sampling.seed))))
    uniform = ((hashed >> np.uint32(9)) + 0.5) * 2.0**-23
    scores = np.full(logits.size, -np.inf)
    scaled = logits[support].astype(np.float64) / sampling.temperature
    scores[support] = scaled - np.log(-np.log(uniform))
    return scores


def _pcg(value: Integers | np.uint32) -> npt.NDArray[np.uint32]:
    """Jarzynski & Olano 2020, "Hash Functions for GPU Rendering": pcg."""
    state = np.atleast_1d(value).astype(np.uint32) * np.uint32(747796405) + np.uint32(2891336453)
    word = ((state >> ((state >> np.uint32(28)) + np.uint32(4))) ^ state) * np.uint32(277803737)
    hashed: npt.NDArray[np.uint32] = (word >> np.uint32(22)) ^ word
    return hashed


class Reference:
    """A Llama run by the functions above, in the floating type of its tensors.

    `tensors` has the names of a weights file: dense matrices (rows, cols), `qkv_proj` and
    `gate_up_proj` fused, vectors with `.weight`. With `int8`, what each matrix product reads is
    quantized first. The cache rounds to `cache_dtype`: float16 as the engine's does, unless it
    keeps keys and values in `cache_bits`.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, Floats],
        *,
        int8: bool = False,
        cache_dtype: npt.DTypeLike = np.float16,
        cache_bits: tuple[int, int] = (16, 16),
    ) -> None:
        self.config = config
        self.tensors = tensors
        self.int8 = int8
        self.cache_bits = cache_bits
        self.n_past = 0  # positions that the cache holds
        shape = (config.n_layers, config.max_seq_len, config.n_kv_heads, config.head_dim)
        self.k_cache: Floats = np.zeros(shape, cache_dtype)
        self.v_cache: Floats = np.zeros(shape, cache_dtype)

    @classmethod
    def from_weights(cls, file: WeightsFile, **options: Any) -> Self:
        """The model that a weights file holds, as float32."""
        tensors = {name: to_floats(file.matrix(name)) for name in file.matrix_names}
        tensors |= {name: file.tensor(name) for name in layout.vectors(file.config)}
        return cls(file.config, tensors, **options)

    @classmethod
    def from_source(cls, source: Source, **options: Any) -> Self:
        """The model before quantization, in float32: what quality is measured against."""
        tensors = {name: source.vector(name) for name in layout.vectors(source.config)}
        for matrix in layout.matrices(source.config):
            parts = [source.tensors[name].read() for name, _ in matrix.parts]
            tensors[matrix.name] = np.concatenate(parts)
        return cls(source.config, tensors, **options)

    def logits(self, token_ids: Iterable[int]) -> Floats:
        """n ids of a new text -> (n, vocab_size): row i scores what follows token_ids[: i + 1]."""
        self.n_past = 0
        return self.extend(token_ids)

    def step(self, token_id: int) -> Floats:
        """One more token of the same text -> (vocab_size,)."""
        scores: Floats = self.extend([token_id])[0]
        return scores

    def extend(self, token_ids: Iterable[int]) -> Floats:
        """n more tokens of the same text -> (n, vocab_size)."""
        c, t, pos = self.config, self.tensors, self.n_past
        x = embed(t["model.embed_tokens"], np.fromiter(token_ids, np.int64))  # (n, dim)
        for i in range(c.n_layers):
            layer = f"model.layers.{i}"
            k_cache, v_cache = self.k_cache[i], self.v_cache[i]

            xn = rms_norm(x, t[f"{layer}.input_layernorm.weight"], c.norm_eps)
            qkv = self._product(f"{layer}.self_attn.qkv_proj", xn)
            bias = t[f"{layer}.self_attn.qkv_proj.bias"] if c.qkv_bias else None
            norms = [t[f"{layer}.self_attn.{part}_norm.weight"] for part in "qk" if c.qk_norm]
            qkv = qkv_heads(c, qkv, bias, norms)
            q, k, v = np.split(qkv, (c.n_heads, c.n_heads + c.n_kv_heads), axis=1)
            if c.is_rotated(i):
                q, k = (rope(each, pos, c.rope_theta, c.rope_divisors) for each in (q, k))
            k, v = (cached(each, bits) for each, bits in zip((k, v), self.cache_bits, strict=True))
            cache_write(k_cache, v_cache, k, v, pos)
            attn = attention(q, k_cache, v_cache, pos, c.score_scale, c.window(i))
            x = x + self._product(f"{layer}.self_attn.o_proj", attn)

            xn = rms_norm(x, t[f"{layer}.post_attention_layernorm.weight"], c.norm_eps)
            gate_up = self._product(f"{layer}.mlp.gate_up_proj", xn)
            x = x + self._product(f"{layer}.mlp.down_proj", swiglu(gate_up))
        self.n_past += len(x)
        xn = rms_norm(x, t["model.norm.weight"], c.norm_eps)
        return self._product("model.embed_tokens" if c.tie_embeddings else "lm_head", xn)

    def _product(self, name: str, x: Floats) -> Floats:
        """W x; int8 activations enter as the numbers that they stand for."""
        if self.int8:
            x = dequantize_activations(*quantize_activations(x), x.shape[-1])
        return matvec(self.tensors[name], x)
