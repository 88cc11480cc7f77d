"""The oracle's model against a naive Llama, against itself, and against transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from conftest import Golden

from codec.matrix import encode_matrix
from codec.scale import to_scale
from model.config import ModelConfig
from model.reference import Reference
from weights import layout
from weights.sources import LazyTensor, Source
from weights.store import WeightsFile, write_weights

AssertClose = Callable[[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike], None]
Tensors = dict[str, npt.NDArray[np.float32]]

EPS32 = 2.0**-24  # half a unit in the last place of 1.0, float32
EPS64 = 2.0**-53


@pytest.fixture(scope="module")
def tiny_parts(tiny_config: ModelConfig, tiny_tensors: Tensors) -> Tensors:
    """`tiny_tensors` taken apart: under Hugging Face names."""
    parts = {name: tiny_tensors[name] for name in layout.vectors(tiny_config)}
    for matrix in layout.matrices(tiny_config):
        ends = np.cumsum([rows for _, rows in matrix.parts])
        split = np.split(tiny_tensors[matrix.name], ends[:-1])
        parts |= {name: part for (name, _), part in zip(matrix.parts, split, strict=True)}
    return parts


def naive_llama(c: ModelConfig, hf: Tensors, ids: list[int]) -> npt.NDArray[np.float64]:
    """A Llama in float64, token by token and head by head; a rotated pair is a complex number."""

    def norm(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        return x * (np.vdot(x, x) / c.dim + c.norm_eps) ** -0.5 * hf[f"{name}.weight"]

    def rotated(x: npt.NDArray[np.float64], pos: int) -> npt.NDArray[np.complex128]:
        real, imag = x.reshape(-1, 2, c.head_dim // 2).transpose(1, 0, 2)
        turn = pos * c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        return (real + 1j * imag) * np.exp(1j * turn)  # (heads, head_dim / 2)

    logits = []
    keys: list[list[npt.NDArray[np.complex128]]] = [[] for _ in range(c.n_layers)]
    values: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(c.n_layers)]
    for pos, token in enumerate(ids):
        x = hf["model.embed_tokens.weight"][token].astype(np.float64)
        for i in range(c.n_layers):
            at = f"model.layers.{i}"
            q, k, v = (
                hf[f"{at}.self_attn.{name}_proj.weight"] @ norm(x, f"{at}.input_layernorm")
                for name in "qkv"
            )
            keys[i].append(rotated(k, pos))
            values[i].append(v.reshape(c.n_kv_heads, c.head_dim))
            mixed = []
            for head, q_head in enumerate(rotated(q, pos)):
                shared = head * c.n_kv_heads // c.n_heads
                scores = [np.vdot(k[shared], q_head).real / c.head_dim**0.5 for k in keys[i]]
                share = np.exp(scores) / np.exp(scores).sum()
                mixed.append(sum(s * v[shared] for s, v in zip(share, values[i], strict=True)))
            x = x + hf[f"{at}.self_attn.o_proj.weight"] @ np.concatenate(mixed)

            xn = norm(x, f"{at}.post_attention_layernorm")
            gate, up = (hf[f"{at}.mlp.{name}_proj.weight"] @ xn for name in ("gate", "up"))
            x = x + hf[f"{at}.mlp.down_proj.weight"] @ (gate / (1 + np.exp(-gate)) * up)
        head_name = "model.embed_tokens" if c.tie_embeddings else "lm_head"
        logits.append(hf[f"{head_name}.weight"] @ norm(x, "model.norm"))
    return np.array(logits)


@pytest.mark.parametrize("tied", [False, True])
def test_reference_is_a_llama(
    tiny_config: ModelConfig,
    tiny_tensors: Tensors,
    tiny_parts: Tensors,
    assert_close: AssertClose,
    tied: bool,
) -> None:
    config = dataclasses.replace(tiny_config, tie_embeddings=tied)
    ids = [3, 1, 4, 1, 59, 26]
    want = naive_llama(config, tiny_parts, ids)
    tensors = {name: tensor.astype(np.float64) for name, tensor in tiny_tensors.items()}
    exact = Reference(config, tensors, cache_dtype=np.float64).logits(ids)
    # Logits of size 1 to 4 through 11 sums of up to 100 terms, in another order: 32 roundings were
    # seen to remain in float64, 24 in float32; four times as many are allowed.
    assert_close(exact, want, 128 * EPS64)
    in_float32 = Reference(config, tiny_tensors, cache_dtype=np.float32).logits(ids)
    assert_close(in_float32, want, 128 * EPS32)


def test_reference_incremental_equals_prefill(
    tiny_config: ModelConfig,
    tiny_tensors: Tensors,
    assert_close: AssertClose,
) -> None:
    rng = np.random.default_rng(7)
    ids = rng.integers(0, tiny_config.vocab_size, 23).tolist()
    tensors = {name: tensor.astype(np.float64) for name, tensor in tiny_tensors.items()}
    model = Reference(tiny_config, tensors)
    whole = model.logits(ids)
    assert whole.shape == (23, tiny_config.vocab_size) and whole.dtype == np.float64

    assert np.array_equal(model.logits(ids), whole)  # what came before is forgotten
    steps = [model.logits(ids[:1])[0], *map(model.step, ids[1:9]), *model.extend(ids[9:])]
    # Only the order of float64 sums differs, as above. (A value on a rounding boundary of the
    # float16 cache could go the other way; of the 3000 cached here none lies so close.)
    assert_close(steps, whole, 128 * EPS64)


def test_reference_rounds_its_cache_and_its_activations_when_asked(
    tiny_config: ModelConfig, tiny_tensors: Tensors
) -> None:
    ids = [3, 1, 4, 1, 5, 92, 65, 35]
    exact = Reference(tiny_config, tiny_tensors, cache_dtype=np.float32).logits(ids)
    cached = Reference(tiny_config, tiny_tensors).logits(ids)
    int8 = Reference(tiny_config, tiny_tensors, int8=True).logits(ids)
    assert exact.dtype == cached.dtype == int8.dtype == np.float32
    # Roundings of 2^-11 in float16 and 1/254 of a block's largest in int8: int8 shows more.
    error_cached, error_int8 = np.abs(cached - exact).max(), np.abs(int8 - exact).max()
    assert 0 < 4 * error_cached < error_int8 < 0.2 * np.abs(exact).max()


def test_reference_from_source_stacks_the_rows_of_fused_matrices(
    tiny_config: ModelConfig,
    tiny_tensors: Tensors,
    tiny_parts: Tensors,
) -> None:
    lazy = {name: LazyTensor(w.shape, partial(np.copy, w)) for name, w in tiny_parts.items()}
    source = Source("tiny", tiny_config, lazy, b"{}", None)
    want = Reference(tiny_config, tiny_tensors).logits([5, 6, 7])
    assert np.array_equal(Reference.from_source(source).logits([5, 6, 7]), want)


def test_reference_from_weights_runs_the_integers_times_their_scale(
    tmp_path: Path,
    tiny_config: ModelConfig,
    tiny_tensors: Tensors,
) -> None:
    dense = {name: tiny_tensors[name] for name in layout.vectors(tiny_config)}
    coded = []
    rng = np.random.default_rng(7)
    for matrix in layout.matrices(tiny_config):
        q = rng.integers(-9, 10, (matrix.rows, matrix.cols))
        scale_log2 = rng.integers(-53, -40, matrix.rows).astype(np.int16)
        scale = to_scale(scale_log2).astype(np.float64)
        dense[matrix.name] = (scale[:, None] * q).astype(np.float32)
        coded.append((matrix.name, encode_matrix(q, scale_log2)))
    write_weights(
        tmp_path / "tiny.answer",
        config=tiny_config,
        matrices=coded,
        vectors={name: dense[name] for name in layout.vectors(tiny_config)},
        tokenizer_json=b"{}",
        chat_template=None,
        source="tiny",
    )
    file = WeightsFile.open(tmp_path / "tiny.answer")
    want = Reference(tiny_config, dense).logits([5, 6, 7])
    assert np.array_equal(Reference.from_weights(file).logits([5, 6, 7]), want)


@pytest.fixture(scope="module")
def smollm2(default_model: Source) -> Reference:
    return Reference.from_source(default_model)


@pytest.mark.real_weights
@pytest.mark.slow
@pytest.mark.parametrize(
    ("cache_dtype", "tolerance"),
    [
        # The golden's own rounding, 2^-13 = 1.2e-4; two float32 runs through 30 layers, summed in
        # different orders, were seen to differ by 5.5e-5, and get four times as much.
        (np.float32, 2.0**-13 + 2.2e-4),
        # A float16 cache moves each key and value by up to 2^-11 of itself: seen 0.033.
        (np.float16, 0.1),
    ],
)
def test_reference_follows_transformers(
    smollm2: Reference,
    goldens: list[Golden],
    assert_close: AssertClose,
    cache_dtype: type,
    tolerance: float,
) -> None:
    model = Reference(smollm2.config, smollm2.tensors, cache_dtype=cache_dtype)
    for golden in goldens:
        logits = model.logits(golden.prompt_ids + golden.gen_ids[:-1])[-64:]  # (64, vocab_size)
        assert_close(logits[0], golden.last_logits, tolerance)
        # Two logits move by at most the tolerance each, so their order holds beyond twice that.
        decided = golden.margins > 2 * tolerance
        assert decided.mean() > 0.8, golden.name
        greedy = np.argmax(logits, axis=-1)
        assert greedy[decided].tolist() == np.array(golden.gen_ids)[decided].tolist(), golden.name
