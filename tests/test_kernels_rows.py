"""The kernels of passes over several sequences, each against its numpy twin."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from cache_layout import pack, unpack
from kernel_checks import (
    F32,
    attend,
    attention_cut,
    attention_error,
    check_quantized,
    read_activations,
)
from kernel_checks import kernels as kernels
from kernel_checks import rng as rng

from engine.kernel import Kernels, shader_source
from engine.plan import run
from engine.sampler import STEPS, BatchSampler, Sampling
from model import reference
from model.activations import Activations
from model.kv_cache import BLOCK, KINDS
from model.llama import rope_table
from model.rows import MATVEC_ROWS

pytestmark = pytest.mark.gpu


def test_shaders_agree_with_the_host() -> None:
    for name, shader, value in (
        ("BLOCK", "cache_write", BLOCK),
        ("MOST_SUMS", "matvec", MATVEC_ROWS),
    ):
        declared = re.search(rf"^const {name} = (\d+)u;", shader_source(shader), re.MULTILINE)
        assert declared and int(declared[1]) == value


# Rows of a pass: (sequence, position), those of one sequence side by side.
PLACES = [(0, 0), (1, 15), (1, 16), (1, 17), (2, 200), (3, 64), (3, 65)]


@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim", "finish"),
    [(6, 2, 24, False), (9, 3, 64, True), (7, 1, 80, False), (7, 1, 128, True)],
)
@pytest.mark.parametrize(
    ("n_splits", "lanes", "per_lane", "cache", "window"),
    [
        (1, 16, 4, "f16", 0),
        (16, 256, 1, "f16", 0),
        (2, 24, 2, "f32", 50),
        (1, 16, 4, "int8", 0),
        (16, 64, 1, "int4", 0),
        (8, 0, 0, "f16", 100),
        (2, 0, 0, "int8", 0),
        (1, 0, 0, "int4", 50),
    ],
)
def test_attention_of_several_sequences(
    kernels: Kernels,
    rng: np.random.Generator,
    assert_close: Callable[..., None],
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    finish: bool,
    n_splits: int,
    lanes: int,
    per_lane: int,
    cache: str,
    window: int,
) -> None:
    """Each row as if its sequence were alone, whose positions lie in blocks here and there."""
    device, theta, max_pos = kernels.device, 10000.0, 208
    all_heads, n = n_heads + 2 * n_kv_heads, len(PLACES)
    per_table, n_sequences = max_pos // BLOCK, 4
    n_positions = BLOCK * per_table * n_sequences
    tables = rng.permutation(per_table * n_sequences).reshape(n_sequences, per_table)
    shape = n_positions, n_kv_heads, head_dim
    packed = [pack(rng.normal(size=shape).astype(np.float32), bits) for bits in KINDS[cache]]
    past = [unpack(words, shape, bits)[0] for words, bits in zip(packed, KINDS[cache], strict=True)]
    y = rng.normal(size=(n + 1, all_heads * head_dim)).astype(np.float32)
    state = device.upload("state", np.array([0, n] + [0] * 10, np.uint32))
    firsts = [next(i for i, (s, _) in enumerate(PLACES) if s == sequence) for sequence, _ in PLACES]
    rows = np.zeros((n + 1, 4), np.uint32)
    rows[:n, 0], rows[:n, 2] = [pos for _, pos in PLACES], firsts
    of_rows = np.append(tables[[s for s, _ in PLACES]].ravel(), np.zeros(64 + per_table))
    keys, values = (device.upload(f"cache {i}", packed[i]) for i in range(2))
    out = Activations.empty(device, "attn", n + 1, 3, n_heads * head_dim)
    attend(
        kernels,
        n + 1,
        out,
        overrides=dict(
            key_bits=KINDS[cache][0],
            value_bits=KINDS[cache][1],
            half_quads=head_dim // 8,
            splits=1,
            window=window,
            n_splits=n_splits,
            **attention_cut(n_heads // n_kv_heads, head_dim, lanes, per_lane, finish),
            batched=True,
            paged=True,
        ),
        params=dict(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            max_pos=n_positions,
            blocks_per_table=per_table,
        ),
        rows_to_combine=n,
        partial=device.empty("partial", 4 * (n + 1) * n_heads * n_splits * (head_dim + 2)),
        buffers=dict(
            state=state,
            pass_rows=device.upload("pass_rows", rows),
            blocks=device.upload("blocks", of_rows.astype(np.uint32)),
            y=device.upload("y", y),
            rope=device.upload("rope", rope_table(max_pos, head_dim, theta)),
            k_cache=keys,
            v_cache=values,
        ),
    )

    (got_k, step_k), (got_v, step_v) = (
        unpack(device.read(buffer, np.uint32, words.shape), shape, bits)
        for buffer, words, bits in zip((keys, values), packed, KINDS[cache], strict=True)
    )
    q, k, v = np.split(
        y[:n].astype(np.float64).reshape(n, all_heads, head_dim), [n_heads, n_heads + n_kv_heads], 1
    )
    size, half_ulp = np.abs(y).max(), 2.0**-11 if cache == "f16" else 0.0
    written = np.zeros(n_positions, bool)
    got = read_activations(device, out, n + 1, 3, n_heads * head_dim)
    for row, (sequence, pos) in enumerate(PLACES):
        place = (BLOCK * tables[sequence][:, None] + np.arange(BLOCK)).ravel()
        written[place[pos]] = True
        # As test_rope_cache_and_attention derives both; of integers half a step, and the rounding
        # of their scale and of the product with it.
        want_k = reference.rope(k[row : row + 1], pos, theta)[0]
        for got_x, step, want_x in ((got_k, step_k, want_k), (got_v, step_v, v[row])):
            tolerance = half_ulp * np.abs(want_x) + 2.0**-24 + 12 * F32 * size
            assert_close(got_x[place[pos]], want_x, tolerance + step[place[pos]] / 2)
        for step, want_x, bits in zip(
            (step_k, step_v), (want_k, v[row]), KINDS[cache], strict=True
        ):
            if bits < 16:  # the largest is the last integer
                largest = (1 << (bits - 1)) - 1
                parts = np.abs(want_x).reshape(n_kv_heads, 2 if bits == 4 else 1, -1).max(axis=-1)
                of_parts = step[place[pos]].reshape(*parts.shape, -1)[..., 0]
                assert_close(of_parts * largest, parts, 16 * F32 * size)
        want_q = reference.rope(q[row : row + 1], pos, theta)
        cached = [values[place[: pos + 1]].astype(np.float64) for values in (got_k, got_v)]
        want = reference.attention(want_q, *cached, pos, window=window or None)
        error = attention_error(size, want_q, *cached)
        of_row = {key: values[row : row + 1] for key, values in got.items()}
        check_quantized(assert_close, of_row, want, 3, error)
    assert (got_k[~written] == past[0][~written]).all()
    assert (got_v[~written] == past[1][~written]).all()


def test_rows_are_drawn_each_in_its_own_way(kernels: Kernels, rng: np.random.Generator) -> None:
    """As each would be alone, step after step; what is past the pass's last row stays."""
    device, n, vocab_size, most = kernels.device, 5, 301, 8
    logits = (rng.normal(size=(most, vocab_size)) * 3).astype(np.float32)
    samplings = [
        Sampling(),
        Sampling(temperature=1.3, top_k=40, seed=5),
        Sampling(0.9, 0, 0.9, 0.05, 6),
        Sampling(temperature=0.7, seed=5),
        Sampling(temperature=1.0, min_p=0.2, seed=1 << 31),
    ]
    positions = [0, 7, 7, 300, 12]
    state = device.upload("state", np.array([0, n, 0, 0] + [9] * most, np.uint32))
    rows = np.zeros((most, 4), np.uint32)
    rows[:n, 0], rows[:n, 1] = positions, [s.seed for s in samplings]
    pass_rows = device.upload("pass_rows", rows)
    logits_buffer = device.upload("logits", logits)
    sampler = BatchSampler(kernels, state, pass_rows, logits_buffer, vocab_size, most)
    sampler.configure(samplings)
    n_steps = STEPS + 2  # around the ring
    run(device, *[sampler.plan(most)] * n_steps)
    want = np.array(
        [
            [
                reference.sampling_scores(
                    logits[row], samplings[row], positions[row] + 1 + step
                ).argmax()
                for row in range(n)
            ]
            for step in range(n_steps)
        ]
    )
    ring = device.read(sampler.sampled, np.uint32, (STEPS, most))
    assert not ring[:, n:].any()
    for step in range(2, n_steps):
        assert (ring[step % STEPS, :n] == want[step]).all()
    after = device.read(pass_rows, np.uint32, (most, 4))
    assert (after[:n, 0] == np.array(positions) + n_steps).all() and (after[:n, 3] == n_steps).all()
    assert (after[n:] == rows[n:]).all()
    tokens = device.read(state, np.uint32, (4 + most,))[4:]
    assert (tokens[:n] == want[-1]).all() and (tokens[n:] == 9).all()
