"""A source model to a weights file, without calibration: quantize, encode, verify, write.

Two passes over the source, matrix by matrix: histograms, from which the step constants follow for
the asked rates; then the code itself. Memory holds a few matrices at a time, never the model.
Without loss there is nothing to measure, and the second pass is all.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress

from codec.lossless import AnyMatrix, LosslessMatrix, decode_lossless, encode_lossless
from codec.matrix import CodedMatrix, decode_matrix, encode_matrix
from codec.quantize import Histogram, bisect_constant, histogram, quantize, row_steps
from engine.errors import EngineError, WeightsError
from weights import layout
from weights.inspect import MatrixReport, describe, format_file
from weights.sources import Source, open_source
from weights.store import WeightsFile, write_weights

# Part of the name of a converted file in the cache: to be raised whenever the same source and bits
# give another file.
RECIPE_VERSION = 2

Bits = float | Literal["lossless"]  # stored per weight of the blocks
DEFAULT_BITS = 5.0
# Of the embedding and an untied head, which are never coarser than the blocks. For the default
# model at 5 bits, 6 here cost a twentieth of the divergence that the blocks cost.
LEAST_EMBED_BITS = 6.0
MIN_BITS, MAX_BITS = 2.0, 8.0
# 12 saves 0.01 bit and costs up to half the speed: its table crowds out workgroups.
DEFAULT_LOG2_STATES = 11

Array = npt.NDArray[np.float32]
T = TypeVar("T")
R = TypeVar("R")


def convert(
    source: Source,
    out: str | Path,
    bits: Bits = DEFAULT_BITS,
    embed_bits: float | None = None,
    log2_states: int = DEFAULT_LOG2_STATES,
    progress: bool = True,
) -> list[MatrixReport]:
    """Write `source` to the file `out`, which appears whole or not at all; returns what it cost.

    The matrices of all blocks together take `bits` per weight, everything stored counted in; the
    embedding and an untied head take `embed_bits` each, by default as many, but at least
    LEAST_EMBED_BITS. With "lossless" every weight of all matrices stays the float32 that the source
    gives, bit for bit. `progress` shows a bar on a terminal.
    WeightsError: weights that are not finite, rates out of reach, or a file that cannot be written.
    """
    rates = None
    if bits != "lossless":
        rates = bits, max(bits, LEAST_EMBED_BITS) if embed_bits is None else embed_bits
        _check_rates(*rates)
    elif embed_bits is not None:
        raise WeightsError(f"embed-bits is {embed_bits:g}, but lossless holds for all matrices")
    matrices = layout.matrices(source.config)
    bar = Progress(console=Console(stderr=True), disable=not (progress and sys.stderr.isatty()))
    with bar:
        constants: dict[str, float] = {}
        if rates:
            measured = bar.track(
                _in_order(lambda matrix: _histogram(source, matrix), matrices),
                total=len(matrices),
                description="measuring",
            )
            constants = _constants(matrices, list(measured), *rates, log2_states)

        def encode(matrix: layout.Matrix) -> tuple[AnyMatrix, MatrixReport]:
            if rates:
                return _encode(source, matrix, constants[matrix.name], log2_states)
            return _encode_lossless(source, matrix, log2_states)

        encoded = bar.track(
            _in_order(encode, matrices), total=len(matrices), description="encoding"
        )
        reports: list[MatrixReport] = []

        def reported() -> Iterator[tuple[str, AnyMatrix]]:
            for coded, report in encoded:
                reports.append(report)
                yield report.name, coded

        write_weights(
            out,
            config=source.config,
            matrices=reported(),
            vectors={name: _read(source, name) for name in layout.vectors(source.config)},
            tokenizer_json=source.tokenizer_json,
            chat_template=source.chat_template,
            source=source.name,
        )
    return reports


def _check_rates(bits: float, embed_bits: float) -> None:
    for name, rate in (("bits", bits), ("embed-bits", embed_bits)):
        if not MIN_BITS <= rate <= MAX_BITS:
            raise WeightsError(
                f"{name} is {rate:g}, expected {MIN_BITS:g} to {MAX_BITS:g} bits per weight"
            )


def _constants(
    matrices: list[layout.Matrix],
    histograms: list[Histogram],
    bits: float,
    embed_bits: float,
    log2_states: int,
) -> dict[str, float]:
    """The step constant c of each matrix: one for all blocks, one each for embedding and head."""
    groups: dict[str, list[int]] = {}
    for i, matrix in enumerate(matrices):
        groups.setdefault("the blocks" if matrix.in_block else matrix.name, []).append(i)
    constants: dict[str, float] = {}
    for group, members in groups.items():
        rate = bits if matrices[members[0]].in_block else embed_bits
        try:
            c = bisect_constant([histograms[i] for i in members], rate, log2_states)
        except ValueError as error:
            raise WeightsError(f"{group}: {error}; ask for other bits") from None
        constants |= {matrices[i].name: c for i in members}
    return constants


def _histogram(source: Source, matrix: layout.Matrix) -> Histogram:
    try:
        return histogram(_fused(source, matrix))
    except ValueError as error:
        raise WeightsError(f"{matrix.name}: {error}") from None


def _encode(
    source: Source, matrix: layout.Matrix, c: float, log2_states: int
) -> tuple[CodedMatrix, MatrixReport]:
    w = _fused(source, matrix)
    try:
        scale = row_steps(w, c)
        q = quantize(w, scale)
        del w  # the largest array, and of no more use
        coded = encode_matrix(q, scale, log2_states)
    except ValueError as error:
        raise WeightsError(f"{matrix.name}: {error}") from None
    # What is written is never looked at again until it is used, perhaps years later.
    if not np.array_equal(decode_matrix(coded), q):
        raise RuntimeError(f"{matrix.name}: decoding does not give back what was encoded")
    return coded, describe(matrix.name, coded, q)


def _encode_lossless(
    source: Source, matrix: layout.Matrix, log2_states: int
) -> tuple[LosslessMatrix, MatrixReport]:
    w = _fused(source, matrix)
    try:
        coded = encode_lossless(w, log2_states)
    except ValueError as error:
        raise WeightsError(f"{matrix.name}: {error}") from None
    if not np.array_equal(decode_lossless(coded).view(np.uint32), w.view(np.uint32)):
        raise RuntimeError(f"{matrix.name}: decoding does not give back what was encoded")
    return coded, describe(matrix.name, coded, w)


def _fused(source: Source, matrix: layout.Matrix) -> Array:
    """The source's tensors stacked to (rows, cols)."""
    parts = [_read(source, name) for name, _ in matrix.parts]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _read(source: Source, name: str) -> Array:
    values = source.tensors[name].read()
    if not np.isfinite(values).all():
        bad = np.unravel_index(np.argmin(np.isfinite(values)), values.shape)
        at = ", ".join(map(str, bad))
        raise WeightsError(
            f"{source.name}: {name}[{at}] is {values[bad]}; the source model is damaged"
        )
    return values


def _in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """map() on several threads, with no more results waiting than there are threads."""
    n_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error or Ctrl-C, what has not begun is not worth waiting for
            pool.shutdown(wait=True, cancel_futures=True)


def parse_bits(text: str) -> Bits:
    """An argparse type: what `--bits` takes."""
    if text == "lossless":
        return "lossless"
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or lossless, found {text!r}") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m weights.convert",
        description="Convert a model to this engine's entropy-coded weights file.",
        epilog="example: python -m weights.convert smollm2 smollm2.safetensors --bits 4.5",
    )
    parser.add_argument("source", help="a Hugging Face folder, a .gguf file, or `smollm2`")
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument(
        "--bits",
        type=parse_bits,
        default=DEFAULT_BITS,
        help="stored bits per weight of the blocks, 2 to 8 (default %(default)s), or `lossless`: "
        "all weights bit for bit",
    )
    parser.add_argument(
        "--embed-bits",
        type=float,
        help="the same of the embedding and the head "
        f"(default: as --bits, but at least {LEAST_EMBED_BITS:g})",
    )
    parser.add_argument(
        "--log2-states",
        type=int,
        choices=(11, 12),
        default=DEFAULT_LOG2_STATES,
        help="size of the decode tables: 11 saves GPU memory, 12 bits (default %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report")
    options = parser.parse_args(arguments)
    try:
        reports = convert(
            open_source(options.source),
            options.out,
            options.bits,
            options.embed_bits,
            options.log2_states,
            progress=not options.quiet,
        )
        if not options.quiet:
            print(format_file(WeightsFile.open(options.out), reports))
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
