"""A source model to a weights file: calibrate, quantize, encode, verify, write.

Two passes over the source, matrix by matrix: histograms, from which the step constants follow for
the asked rates; then the code itself. By the full recipe blocks are quantized in turn between the
two. Memory holds a few matrices at a time, never the model, but for the sampling of calibration
text. Without loss there is nothing to measure, and the second pass is all.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import Progress
from threadpoolctl import threadpool_limits

from codec.lossless import AnyMatrix, LosslessMatrix, decode_lossless, encode_lossless
from codec.matrix import CodedMatrix, decode_matrix
from engine.errors import EngineError, WeightsError
from engine.tokenizer import Tokenizer
from weights import layout
from weights.bits import Bits, parse_bits
from weights.calibration.calibration import Calibration, calibrate, own_text
from weights.calibration.in_turn import quantize_in_turn
from weights.calibration.text import read_windows
from weights.container import check_place
from weights.folder import cache_folder
from weights.inspect import MatrixReport, describe, format_file
from weights.parallel import in_processes, matrix_bytes, memory_bytes
from weights.quantizers import InTurn, Plain, Quantizer, Whitened, code, measure, read_fused
from weights.rates import check_rates, find_constants
from weights.sources import Source, open_source
from weights.store import WeightsFile, write_weights

# Part of the name of a converted file in the cache: to be raised whenever the same source and bits
# give another file.
RECIPE_VERSION = 7

R = TypeVar("R")
Encode = Callable[[layout.Matrix], tuple[AnyMatrix, MatrixReport]]
DEFAULT_BITS = 5.0
# 12 saves 0.01 bit and costs up to half the speed: its table crowds out workgroups.
DEFAULT_LOG2_STATES = 11

_SPARSITY_NEEDS = "sparsity needs a calibration: which weights matter is not known"


@dataclass(frozen=True)
class CalibrationText:
    """How many tokens the quantizer learns from, 0 to do without; the model's own if no `file`."""

    tokens: int
    file: Path | None = None
    window: int = 256  # tokens that see each other
    in_turn: bool = False  # blocks on the same text; see weights/calibration/in_turn.py


FULL = CalibrationText(16384, in_turn=True)
# As good as in windows of 256, and written in fewer steps.
QUICK = CalibrationText(4096, window=128)


def convert(
    source: Source,
    out: str | Path,
    bits: Bits = DEFAULT_BITS,
    embed_bits: float | None = None,
    log2_states: int = DEFAULT_LOG2_STATES,
    text: CalibrationText = FULL,
    sparsity: float = 0.0,
    progress: bool = True,
    keep_calibration: bool = False,
) -> list[MatrixReport]:
    """Write `source` to the file `out`, which appears whole or not at all; returns what it cost.

    All matrices together take `bits` per weight, everything stored counted in, each as many as its
    errors are worth. Where that is not known (without calibration the embedding and the head, with
    it an embedding that is not the head), or where `embed_bits` is given, embedding and head take
    that many, by default `bits` but at least LEAST_EMBED_BITS, and `bits` are those of the blocks.
    A model too large to write its own text in half of the machine's memory goes without.
    A share `sparsity` of the blocks' weights is set to zero first, which needs a calibration.
    With "lossless" every weight stays the float32 that the source gives, bit for bit. `progress`
    shows a bar on a terminal. A calibration is removed when the file is there, unless
    `keep_calibration`; one that was stopped, or is still there, is carried on.
    WeightsError: weights that are not finite, rates out of reach, or a file that cannot be written;
    EngineError: a calibration text that cannot be used.
    """
    if bits == "lossless":
        if embed_bits is not None:
            raise WeightsError(f"embed-bits is {embed_bits:g}, but lossless holds for all matrices")
        if sparsity:
            raise WeightsError(f"sparsity is {sparsity:g}, but lossless keeps all weights")
    else:
        check_rates(bits, embed_bits)
    if text.tokens < 0:
        raise WeightsError(f"calibration-tokens is {text.tokens}, expected 0 or more")
    if not 0 <= sparsity < 1:
        raise WeightsError(f"sparsity is {sparsity:g}, expected 0 to less than 1")
    if sparsity and text.tokens == 0:
        raise WeightsError(_SPARSITY_NEEDS)
    check_place(Path(out))
    bar = Progress(console=Console(stderr=True), disable=not (progress and sys.stderr.isatty()))
    # A core works on its own matrix: products that are threaded too would wait for others.
    with bar, threadpool_limits(1, "blas"):
        if bits == "lossless":
            lossless = partial(_encode_lossless, source, log2_states)
            return _write(source, Path(out), Plain(source), lossless, bar)
        calibration = _calibration(source, text, bar)
        if calibration is None and sparsity:
            raise WeightsError(_SPARSITY_NEEDS)
        whitened = Whitened(source, calibration, sparsity) if calibration else None
        quantizer: Quantizer = whitened or Plain(source)
        constants = _constants(source, quantizer, bits, embed_bits, log2_states, bar)
        in_turn = None
        if calibration and whitened and text.in_turn:
            facts = repr((sorted(constants.items()), sparsity, RECIPE_VERSION))
            folder = calibration.folder / hashlib.sha256(facts.encode()).hexdigest()[:16]
            quantizer = in_turn = InTurn(whitened, constants, folder)
            show = _shown(bar, "quantizing")
            quantize_in_turn(source, calibration.tokens, in_turn.quantize, folder, show)
        encode = partial(_encode, quantizer, constants, log2_states)
        reports = _write(source, Path(out), quantizer, encode, bar)
        if in_turn:
            in_turn.remove()
    if calibration and not keep_calibration:
        calibration.remove()
    return reports


def _constants(
    source: Source,
    quantizer: Quantizer,
    bits: float,
    embed_bits: float | None,
    log2_states: int,
    bar: Progress,
) -> dict[str, float]:
    matrices = layout.matrices(source.config)
    measured = bar.track(
        _each(partial(measure, quantizer), matrices), total=len(matrices), description="measuring"
    )
    return find_constants(quantizer, matrices, list(measured), bits, embed_bits, log2_states)


def _write(
    source: Source, out: Path, quantizer: Quantizer, encode: Encode, bar: Progress
) -> list[MatrixReport]:
    matrices = layout.matrices(source.config)
    encoded = bar.track(_each(encode, matrices), total=len(matrices), description="encoding")
    reports: list[MatrixReport] = []

    def reported() -> Iterator[tuple[str, AnyMatrix]]:
        for coded, report in encoded:
            reports.append(report)
            yield report.name, coded

    write_weights(
        out,
        config=source.config,
        matrices=reported(),
        vectors={name: quantizer.vector(name) for name in layout.vectors(source.config)},
        tokenizer_json=source.tokenizer_json,
        chat_template=source.chat_template,
        source=source.name,
    )
    return reports


def _each(function: Callable[[layout.Matrix], R], matrices: list[layout.Matrix]) -> Iterator[R]:
    return in_processes(function, matrices, size=lambda m: matrix_bytes(m.rows, m.cols))


def _shown(bar: Progress, description: str) -> Callable[[int, int], None]:
    task = bar.add_task(description)
    return lambda done, total: bar.update(task, completed=done, total=total)


def _calibration(source: Source, text: CalibrationText, bar: Progress) -> Calibration | None:
    if text.tokens == 0:
        return None
    if text.file is None and 4 * source.config.n_params > memory_bytes() // 2:
        print(
            f"{source.name}: not calibrated, for it would write its own text with all of its "
            f"weights in memory, {4e-9 * source.config.n_params:.0f} GB; --calibration takes yours",
            file=sys.stderr,
        )
        return None
    length = min(text.window, source.config.max_seq_len)
    n_windows = max(1, text.tokens // length)
    folder = cache_folder() / "calibration"
    encode = Tokenizer(source.tokenizer_json, source.chat_template, source.config).encode
    if text.file is None:
        tokens = own_text(source, encode, n_windows, length, folder, _shown(bar, "sampling"))
    else:
        tokens = read_windows(text.file, encode, n_windows, length)
    return calibrate(source, tokens, folder, progress=_shown(bar, "calibrating"))


def _encode(
    quantizer: Quantizer, constants: Mapping[str, float], log2_states: int, matrix: layout.Matrix
) -> tuple[CodedMatrix, MatrixReport]:
    q, coded = code(quantizer, matrix, constants[matrix.name], log2_states)
    # What is written is never looked at again until it is used, perhaps years later.
    if not np.array_equal(decode_matrix(coded), q):
        raise RuntimeError(f"{matrix.name}: decoding does not give back what was encoded")
    return coded, describe(matrix.name, coded, q)


def _encode_lossless(
    source: Source, log2_states: int, matrix: layout.Matrix
) -> tuple[LosslessMatrix, MatrixReport]:
    w = read_fused(source, matrix)
    try:
        coded = encode_lossless(w, log2_states)
    except ValueError as error:
        raise WeightsError(f"{matrix.name}: {error}") from None
    if not np.array_equal(decode_lossless(coded).view(np.uint32), w.view(np.uint32)):
        raise RuntimeError(f"{matrix.name}: decoding does not give back what was encoded")
    return coded, describe(matrix.name, coded, w)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="answer convert",
        description="Convert a model to this engine's entropy-coded weights file.",
        epilog="example: answer convert smollm2 smollm2.safetensors --bits 4.5",
    )
    parser.add_argument(
        "source", help="a Hugging Face folder or hub name, a .gguf file, or `smollm2`"
    )
    parser.add_argument("out", type=Path, help="the file to write")
    parser.add_argument(
        "--bits",
        type=parse_bits,
        default=DEFAULT_BITS,
        help="stored bits per weight, 0.25 to 8 (default %(default)s), or `lossless`: all weights "
        "bit for bit",
    )
    parser.add_argument(
        "--embed-bits",
        type=float,
        help="the same of the embedding and the head alone (default: what they are worth)",
    )
    parser.add_argument(
        "--sparsity",
        type=float,
        default=0.0,
        metavar="S",
        help="share of the blocks' weights to set to zero first, 0 to 1 (default %(default)g)",
    )
    parser.add_argument(
        "--log2-states",
        type=int,
        choices=(11, 12),
        default=DEFAULT_LOG2_STATES,
        help="size of the decode tables: 11 saves GPU memory, 12 bits (default %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a text in UTF-8 to learn from (default: text that the model writes itself)",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=FULL.tokens,
        metavar="N",
        help="how much of it; 0 quantizes without (default %(default)s)",
    )
    parser.add_argument(
        "--keep-calibration",
        action="store_true",
        help="do not delete what was learnt: the next conversion of this model begins with it",
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
            CalibrationText(options.calibration_tokens, options.calibration, in_turn=FULL.in_turn),
            options.sparsity,
            progress=not options.quiet,
            keep_calibration=options.keep_calibration,
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
