"""Models without meaning: a given shape, random weights at a given rate, ready in seconds.

    python -m weights.synthetic 8b 8b.safetensors --bits 3.1

What a benchmark needs of a model are its sizes and the statistics of its integers. These are
Gaussian, as a whitened quantizer's nearly are; of each width of matrix some 2000 rows are coded,
and repeated as often as it takes. Every matrix is in the file in full: nothing is shared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from codec.matrix import CodedMatrix, encode_matrix
from engine.errors import EngineError, WeightsError
from model.config import ModelConfig
from weights import layout
from weights.convert import DEFAULT_LOG2_STATES
from weights.sources.families import read_family
from weights.store import write_weights

_TILE_ROWS = 2048  # that are coded


def _llama(**sizes: int | bool) -> ModelConfig:
    return ModelConfig(
        max_seq_len=131072,
        rope_theta=500000.0,
        norm_eps=1e-5,
        bos_token_id=None,
        eos_token_ids=(),
        **sizes,  # type: ignore[arg-type]
    )


SHAPES = {
    "135m": _llama(  # SmolLM2-135M
        dim=576, hidden_dim=1536, n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64,
        vocab_size=49152, tie_embeddings=True,
    ),
    "1b": _llama(  # Llama-3.2-1B
        dim=2048, hidden_dim=8192, n_layers=16, n_heads=32, n_kv_heads=8, head_dim=64,
        vocab_size=128256, tie_embeddings=True,
    ),
    "8b": _llama(  # Llama-3.1-8B
        dim=4096, hidden_dim=14336, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128,
        vocab_size=128256, tie_embeddings=False,
    ),
}  # fmt: skip


def shape(name: str | Path) -> ModelConfig:
    """One of SHAPES, or that of a Hugging Face config.json; ConfigError or WeightsError."""
    if str(name) in SHAPES:
        return SHAPES[str(name)]
    try:
        return read_family(json.loads(Path(name).read_text("utf-8"))).config
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{name}: neither a config.json nor one of {', '.join(SHAPES)} ({error})"
        ) from None


@cache
def _tile(cols: int, bits: float, rows: int) -> CodedMatrix:
    """Up to `rows` coded rows that take a whole number of words, at about `bits` stored in all."""
    rng = np.random.default_rng(cols)
    normal = rng.normal(size=(rows, cols)).astype(np.float32)
    # The entropy of a Gaussian of sigma steps is log2(sigma sqrt(2 pi e)); then what is stored
    # beside it is made up for, twice.
    excess = 0.0
    for n in (min(rows, 256), min(rows, 256), rows):
        sigma = 2 ** (bits - excess) / np.sqrt(2 * np.pi * np.e)
        q = np.rint(normal[:n] * sigma).astype(np.int32)
        # Outputs have the size of the inputs.
        scale_log2 = np.full(n, np.rint(-8 * np.log2(sigma * np.sqrt(cols))), np.int16)
        m = encode_matrix(q, scale_log2, DEFAULT_LOG2_STATES)
        excess += m.bits_per_weight - bits
    return m


def matrix(rows: int, cols: int, bits: float) -> CodedMatrix:
    """A random matrix; `bits` per weight are stored in all, within a hundredth or so.

    Classes of rows are not repeated: a Gaussian has one.
    """
    m = _tile(cols, bits, min(rows, _TILE_ROWS))
    if m.rows == rows:
        return m
    whole = np.flatnonzero(m.row_offsets % 32 == 0)  # rows after which a word is full
    n = int(whole[-1])
    if n == 0 or m.n_classes > 1:
        raise WeightsError(f"no rows of {cols} columns at {bits:g} bits can be repeated")
    times, rest = divmod(rows, n)
    counts = np.append(np.tile(m.outlier_counts[:n], times), m.outlier_counts[:rest])
    ends = m.row_offsets[1 : n + 1] + m.row_offsets[n] * np.arange(times)[:, None]
    last = m.row_offsets[1 : rest + 1] + times * m.row_offsets[n]
    row_offsets = np.concatenate([[0], ends.ravel(), last])
    words = m.words[: m.row_offsets[n] // 32]
    rest_words = m.words[: -(-m.row_offsets[rest] // 32)]
    repeated: dict[str, Any] = {
        name: np.append(np.tile(values[:n], times), values[:rest])
        for name, values in (
            ("states", m.states),
            ("classes", m.classes),
            ("scale_log2", m.scale_log2),
        )
    }
    return replace(
        m,
        rows=rows,
        words=np.append(np.tile(words, times), rest_words),
        row_offsets=row_offsets,
        outlier_offsets=np.append(0, np.cumsum(counts)).astype(np.uint32),
        outliers=np.append(
            np.tile(m.outliers[: m.outlier_offsets[n]], times),
            m.outliers[: m.outlier_offsets[rest]],
        ),
        **repeated,
    )


def write_synthetic(config: ModelConfig, out: str | Path, bits: float) -> None:
    """Write a model of this shape to the weights file `out`, whole or not at all."""

    def matrices() -> Iterator[tuple[str, CodedMatrix]]:
        for found in layout.matrices(config):
            yield found.name, matrix(found.rows, found.cols, bits)

    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, "<unk>"))
    write_weights(
        out,
        config=config,
        matrices=matrices(),
        vectors={name: np.ones(size, np.float32) for name, size in layout.vectors(config).items()},
        tokenizer_json=tokenizer.to_str().encode(),
        chat_template=None,
        source=f"synthetic {config.n_params / 1e6:.0f}M",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m weights.synthetic",
        description="Write a model of random weights, to measure speed and memory with.",
        epilog="example: python -m weights.synthetic 8b 8b.safetensors --bits 3.1",
    )
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or a Hugging Face config.json")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument(
        "--bits", type=float, default=3.1, help="stored bits per weight (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        if not 1 <= options.bits <= 8:
            raise WeightsError(f"bits is {options.bits:g}, expected 1 to 8")
        write_synthetic(shape(options.shape), options.out, options.bits)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
