"""The cache's layout in numpy: what shaders/shared/cache.wgsl says, the other way round as well."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from model.reference import quantize_cache

Words = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float32]


def pack(heads: Floats, bits: int) -> Words:
    """(positions, n_heads, head_dim) as a buffer holds it."""
    n_pos, n_heads, head_dim = heads.shape
    half, padded = head_dim // 2, -(-(head_dim // 2) // 4) * 4
    values, scale = heads, np.zeros((n_pos, n_heads, 1), np.float32)
    if bits <= 8:
        values, scale = quantize_cache(
            heads.reshape(n_pos, n_heads, 2 if bits == 4 else 1, -1), bits
        )
        values = values.reshape(heads.shape)
    kind = {32: np.float32, 16: np.float16}.get(bits, np.int8)
    pairs = np.zeros((n_heads, n_pos, 2, padded), kind)  # lo, hi
    pairs[:, :, 0, :half] = values[..., :half].swapaxes(0, 1)
    pairs[:, :, 1, :half] = values[..., half:].swapaxes(0, 1)
    if bits == 32:
        return pairs.view(np.uint32).ravel()
    if bits == 16:
        return np.ascontiguousarray(pairs.swapaxes(-1, -2)).view(np.uint32).ravel()
    quads = pairs.view(np.uint32).swapaxes(-1, -2)  # (n_heads, n_pos, quads, 2)
    words = quads.reshape(n_heads, n_pos, -1)
    if bits == 4:
        words = quads[..., 0] & 0x0F0F0F0F | (quads[..., 1] & 0x0F0F0F0F) << 4
        scale = scale / 16
    rows = np.zeros((n_heads, n_pos, -(-words.shape[-1] // 4) * 4), np.uint32)
    rows[..., : words.shape[-1]] = words
    scales = np.ascontiguousarray(scale.swapaxes(0, 1), np.float32).view(np.uint32)
    return np.concatenate([rows.ravel(), scales.ravel()])


def unpack(buffer: Words, shape: tuple[int, int, int], bits: int) -> tuple[Floats, Floats]:
    """Such a buffer as heads (positions, n_heads, head_dim), and of the same shape the step of each
    element's rounding: a scale, or nothing.
    """
    n_pos, n_heads, head_dim = shape
    half, padded = head_dim // 2, -(-(head_dim // 2) // 4) * 4
    scale = np.ones((n_heads, n_pos, 1, 1), np.float32)
    step = np.zeros(shape, np.float32)
    if bits == 32:
        pairs = buffer.view(np.float32).reshape(n_heads, n_pos, 2, padded)
    elif bits == 16:
        pairs = buffer.view(np.float16).reshape(n_heads, n_pos, padded, 2).swapaxes(-1, -2)
    else:
        n_words, n_scales = padded // 4 * bits // 4, 2 if bits == 4 else 1
        end = buffer.size - n_heads * n_pos * n_scales
        rows = buffer[:end].reshape(n_heads, n_pos, -1)
        words = np.ascontiguousarray(rows[..., :n_words])
        assert not rows[..., n_words:].any()
        scale = buffer[end:].view(np.float32).reshape(n_heads, n_pos, n_scales, 1)
        if bits == 8:
            quads = words.reshape(n_heads, n_pos, -1, 2)
        else:  # the high half of a byte is 16 times the integer
            quads = np.stack([words << 4 & 0xF0F0F0F0, words & 0xF0F0F0F0], axis=-1)
        quads = np.ascontiguousarray(quads.swapaxes(-1, -2).astype(np.uint32))
        pairs = quads.view(np.int8).reshape(n_heads, n_pos, 2, padded)
        steps = np.repeat(scale[..., 0], head_dim // n_scales, axis=-1).swapaxes(0, 1)
        step = steps * (16 if bits == 4 else 1)
    assert not pairs[..., half:].any()
    heads = (pairs[..., :half] * scale).reshape(n_heads, n_pos, head_dim)
    return heads.astype(np.float32).swapaxes(0, 1), step
