"""The kernels between products, each against its numpy twin; sizes are multiples of nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
from cache_layout import pack, unpack
from kernel_checks import (
    F32,
    HEADS,
    attend,
    attention_cut,
    attention_error,
    check_quantized,
    read_activations,
)
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from engine.kernel import Kernels
from engine.plan import Plan, run
from model import reference
from model.activations import Activations
from model.llama import MAX_TOKENS, rope_table

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("dim", [40, 576, 1003])
@pytest.mark.parametrize("splits", [0, 3])
def test_rms_norm(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    dim: int,
    digits: int,
    splits: int,
) -> None:
    device, tokens, eps = kernels.device, 3, 1e-5
    x0 = rng.normal(size=(tokens, dim)).astype(np.float32)
    y = rng.normal(size=(max(1, splits), tokens, dim)).astype(np.float32)
    weight = rng.normal(1, 0.3, dim).astype(np.float32)
    x, out = device.upload("x", x0), Activations.empty(device, "xn", tokens, digits, dim)
    dispatch = kernels.get("rms_norm", lanes=64, digits=digits, dim=dim, splits=splits).dispatch(
        [1, tokens],
        dict(tokens=tokens, last=0, eps=eps),
        state=device.empty("state", 48),
        y=device.upload("y", y),
        weight=device.upload("weight", weight),
        x=x,
        x_digits=out.digits,
        x_scale=out.scale,
    )
    run(device, Plan([dispatch]))
    sums = x0.astype(np.float64) + y[:splits].astype(np.float64).sum(axis=0)
    terms = np.abs(x0) + np.abs(y[:splits]).sum(axis=0)
    assert_close(device.read(x, np.float32, x0.shape), sums, (splits + 1) * F32 * terms)
    want = reference.rms_norm(sums, weight.astype(np.float64), eps)
    # Inputs off by splits + 1 roundings, the mean of squares by dim of them (half of that after the
    # root), inverseSqrt by 2 ulp (WGSL) and three products.
    relative = (splits + 1 + dim / 2 + 4 + 3) * F32
    error = (
        relative * np.abs(want)
        + (splits + 1) * F32 * terms / np.sqrt((sums**2).mean(axis=1, keepdims=True)) * 2
    )
    check_quantized(
        assert_close, read_activations(device, out, tokens, digits, dim), want, digits, error
    )


def test_rms_norm_of_the_last_token_goes_to_row_0(
    kernels: Kernels, rng: np.random.Generator
) -> None:
    device, tokens, dim = kernels.device, 5, 70
    x0 = rng.normal(size=(tokens, dim)).astype(np.float32)
    weight = device.upload("weight", np.ones(dim, np.float32))

    def norm(n_tokens: int, last: int) -> np.ndarray:
        out = Activations.empty(device, "xn", tokens, 1, dim)
        dispatch = kernels.get("rms_norm", lanes=64, digits=1, dim=dim, splits=0).dispatch(
            [1, 1 if last else tokens],
            dict(tokens=tokens, last=last, eps=1e-5),
            state=device.upload("state", np.array([0, n_tokens] + [0] * 10, np.uint32)),
            y=device.empty("y", 4 * tokens * dim),
            weight=weight,
            x=device.upload("x", x0),
            x_digits=out.digits,
            x_scale=out.scale,
        )
        run(device, Plan([dispatch]))
        return read_activations(device, out, tokens, 1, dim)["x"]

    assert (norm(4, last=1)[0] == norm(5, last=0)[3]).all()


@pytest.mark.parametrize("digits", [1, 3])
def test_a_block_of_zeros_has_scale_zero(kernels: Kernels, digits: int) -> None:
    device, hidden = kernels.device, 40
    out = Activations.empty(device, "h", 1, digits, hidden)
    device.write(out.digits, np.full(64 * digits, 77, np.int8))
    dispatch = kernels.get("swiglu", lanes=64, digits=digits, splits=1).dispatch(
        [1, 1],
        dict(hidden_dim=hidden, n_blocks=2, tokens=1),
        y=device.empty("y", 8 * hidden),
        x_digits=out.digits,
        x_scale=out.scale,
    )
    run(device, Plan([dispatch]))
    got = read_activations(device, out, 1, digits, hidden)
    assert not any(values.any() for values in got.values())
    assert not device.read(out.digits, np.int8, (64 * digits,)).any()


@pytest.mark.parametrize("digits", [1, 3])
@pytest.mark.parametrize("hidden_dim", [70, 1536])
def test_swiglu(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    hidden_dim: int,
    digits: int,
) -> None:
    device, tokens, splits = kernels.device, 2, 2
    y = (rng.normal(size=(splits, tokens, 2 * hidden_dim)) * 4).astype(np.float32)
    out = Activations.empty(device, "h", tokens, digits, hidden_dim)
    n_blocks = -(-hidden_dim // 32)
    dispatch = kernels.get("swiglu", lanes=64, digits=digits, splits=splits).dispatch(
        [-(-n_blocks * 8 // 64), tokens],
        dict(hidden_dim=hidden_dim, n_blocks=n_blocks, tokens=tokens),
        y=device.upload("y", y),
        x_digits=out.digits,
        x_scale=out.scale,
    )
    run(device, Plan([dispatch]))
    sums = y.astype(np.float64).sum(axis=0)
    want = reference.swiglu(sums)
    # silu and the product grow by at most 1.1 |other| a unit of input error; exp is good to (3 + 2
    # |g|) ulp (WGSL).
    gate, up = np.abs(sums[:, :hidden_dim]), np.abs(sums[:, hidden_dim:])
    rounding = 2 * F32 * np.abs(y).sum(axis=0)
    error = 1.1 * rounding[:, :hidden_dim] * up + rounding[:, hidden_dim:] * gate
    error += np.abs(want) * (2 * (3 + 2 * gate) + 8) * F32
    check_quantized(
        assert_close, read_activations(device, out, tokens, digits, hidden_dim), want, digits, error
    )


@pytest.mark.parametrize(("biased", "normed"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), [(6, 2, 16), (3, 3, 70)])
def test_qkv_heads(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    biased: bool,
    normed: bool,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
) -> None:
    device, tokens, splits, eps = kernels.device, 3, 2, 1e-5
    rows = (n_heads + 2 * n_kv_heads) * head_dim
    y = rng.normal(size=(splits, tokens, rows)).astype(np.float32)
    bias = rng.normal(size=rows * biased).astype(np.float32)
    norms = rng.normal(1, 0.2, (2 * normed, head_dim)).astype(np.float32)
    out = device.empty("out", 4 * tokens * rows)
    dispatch = kernels.get(
        "qkv_heads", biased=biased, normed=normed, splits=splits, lanes=32
    ).dispatch(
        [n_heads + 2 * n_kv_heads, tokens],
        dict(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, tokens=tokens, eps=eps),
        y=device.upload("y", y),
        weights=device.upload("weights", np.concatenate([bias, norms.ravel()])),
        out=out,
    )
    run(device, Plan([dispatch]))
    got = device.read(out, np.float32, (tokens, rows // head_dim, head_dim))
    config = SimpleNamespace(
        n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, norm_eps=eps
    )
    sums = y.astype(np.float64).sum(axis=0)
    want = reference.qkv_heads(config, sums, bias if biased else None, [*norms.astype(np.float64)])
    # Two sums, of numbers below 8 in all; a mean of head_dim squares and three products, where a
    # head of length 1 a column is divided by about itself.
    tolerance = 3 * 8 * F32 + (head_dim + 8) * F32 * np.abs(want)
    assert_close(got, want, 2 * tolerance if normed else 3 * 8 * F32)


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim", "finish"), HEADS)
@pytest.mark.parametrize(("pos", "n_tokens"), [(0, 1), (3, 5), (254, 8), (700, 3)])
@pytest.mark.parametrize(
    ("n_splits", "lanes", "per_lane", "cache_f32", "window"),
    [
        (1, 16, 4, False, 0),
        (16, 256, 1, False, 0),
        (2, 24, 3, True, 0),
        (3, 24, 3, False, 100),
        (4, 64, 1, True, 4),
        (1, 0, 0, False, 0),
        (8, 0, 0, False, 0),
        (3, 0, 0, True, 300),
    ],
)
def test_rope_cache_and_attention(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    finish: bool,
    pos: int,
    n_tokens: int,
    n_splits: int,
    lanes: int,
    per_lane: int,
    cache_f32: bool,
    window: int,
) -> None:
    device, max_pos, theta, splits = kernels.device, 720, 10000.0, 2
    padded = -(-(head_dim // 2) // 4) * 4
    all_heads = n_heads + 2 * n_kv_heads
    tokens, bits = MAX_TOKENS, 32 if cache_f32 else 16
    shape = max_pos, n_kv_heads, head_dim
    cache_type = np.float32 if cache_f32 else np.float16
    past = rng.normal(size=(2, *shape)).astype(cache_type).astype(np.float32)
    y = rng.normal(size=(splits, tokens, all_heads * head_dim)).astype(np.float32)

    packed = [pack(heads, bits) for heads in past]
    state = device.upload("state", np.array([pos, n_tokens] + [0] * 10, np.uint32))
    keys, values = device.upload("k_cache", packed[0]), device.upload("v_cache", packed[1])
    out = Activations.empty(device, "attn", tokens, 3, n_heads * head_dim)
    attend(
        kernels,
        tokens,
        out,
        overrides=dict(
            half_quads=padded // 4,
            key_bits=bits,
            value_bits=bits,
            splits=splits,
            window=window,
            n_splits=n_splits,
            **attention_cut(n_heads // n_kv_heads, head_dim, lanes, per_lane, finish),
            batched=False,
            paged=False,
        ),
        params=dict(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            max_pos=max_pos,
            blocks_per_table=0,
        ),
        rows_to_combine=tokens,
        partial=device.empty("partial", 4 * tokens * n_heads * n_splits * (2 * padded + 2)),
        buffers=dict(
            state=state,
            pass_rows=state,
            blocks=state,
            y=device.upload("y", y),
            rope=device.upload("rope", rope_table(max_pos, head_dim, theta)),
            k_cache=keys,
            v_cache=values,
        ),
    )

    qkv = y.astype(np.float64).sum(axis=0)[:n_tokens].reshape(n_tokens, all_heads, head_dim)
    want_q, want_k, want_v = np.split(qkv, [n_heads, n_heads + n_kv_heads], axis=1)
    want_q, want_k = reference.rope(want_q, pos, theta), reference.rope(want_k, pos, theta)
    written = slice(pos, pos + n_tokens)

    got_k, got_v = (
        unpack(device.read(buffer, np.uint32, words.shape), shape, bits)[0]
        for buffer, words in zip((keys, values), packed, strict=True)
    )
    # A sum, a rotation (two products and a sum of numbers below 2 |y|), the table's own rounding;
    # then half an ulp of f16, 2^-11 of the value: the cast may round either way where f32 was off.
    size = np.abs(y).sum(axis=0).max()
    half_ulp = 0.0 if cache_f32 else 2.0**-11
    assert_close(got_k[written], want_k, half_ulp * np.abs(want_k) + 2.0**-24 + 12 * F32 * size)
    assert_close(got_v[written], want_v, half_ulp * np.abs(want_v) + 2.0**-24 + 12 * F32 * size)
    untouched = np.ones(max_pos, bool)
    untouched[written] = False
    assert (got_k[untouched] == past[0][untouched]).all() and (
        got_v[untouched] == past[1][untouched]
    ).all()

    cached = got_k.astype(np.float64), got_v.astype(np.float64)
    want = reference.attention(want_q, *cached, pos, window=window or None)
    n_pos = pos + n_tokens
    error = attention_error(size, want_q, got_k[:n_pos], got_v[:n_pos])
    got = read_activations(device, out, tokens, 3, n_heads * head_dim)
    check_quantized(assert_close, {key: v[:n_tokens] for key, v in got.items()}, want, 3, error)


def test_kernel_names_what_does_not_match(kernels: Kernels) -> None:
    with pytest.raises(
        TypeError, match=r"swiglu: overrides: the shader declares \['digits', 'lanes', 'splits'\]"
    ):
        kernels.get("swiglu", lanes=64)
    kernel = kernels.get("swiglu", lanes=64, digits=1, splits=1)
    with pytest.raises(TypeError, match=r"params.*hidden_dim"):
        kernel.dispatch([1], {"hidden": 1})
    with pytest.raises(TypeError, match=r"buffers.*x_digits"):
        kernel.dispatch(
            [1], dict(hidden_dim=1, n_blocks=1, tokens=1), y=kernels.device.empty("y", 16)
        )


@pytest.mark.parametrize("n_constants", [1, 2, 3])
def test_params_that_are_compiled_in_say_the_same(
    kernels: Kernels, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, n_constants: int
) -> None:
    """As on a GPU, here of any adapter."""
    device, hidden_dim = kernels.device, 70
    y = device.upload("y", rng.normal(size=2 * hidden_dim).astype(np.float32))
    kernel = Kernels(device).get("swiglu", lanes=64, digits=1, splits=1)
    params = dict(hidden_dim=hidden_dim, n_blocks=3, tokens=1)
    names = list(params)[:n_constants]
    constants = {name: params.pop(name) for name in names}

    def h() -> dict[str, np.ndarray]:
        out = Activations.empty(device, "h", 1, 1, hidden_dim)
        dispatch = kernel.dispatch(
            [1, 1], params, constants, y=y, x_digits=out.digits, x_scale=out.scale
        )
        run(device, Plan([dispatch]))
        assert ("params" in dispatch.kernel.bindings) == (not device.constants or bool(params))
        return read_activations(device, out, 1, 1, hidden_dim)

    monkeypatch.setattr(device, "constants", False)
    want = h()
    monkeypatch.setattr(device, "constants", True)
    got = h()
    assert want["x"].any()
    assert all((got[name] == want[name]).all() for name in want)
    with pytest.raises(TypeError, match=r"params.*hidden_dim"):
        kernel.dispatch([1, 1], {}, {"tokens": 1}, y=y)
