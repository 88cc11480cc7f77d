"""FORMAT.md: its example is what the code makes, and its words suffice to decode a matrix."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weights
from codec.lossless import encode_lossless
from codec.matrix import (
    CodedMatrix,
    decode_matrix,
    decode_streams,
    dequantize,
    encode_matrix,
    pack_side,
)
from codec.table import decode_tables

FORMAT = (Path(weights.__file__).parent / "FORMAT.md").read_text("utf-8")
QUANTIZED, LOSSLESS = map(json.loads, re.findall(r"```json\n(.*?)```", FORMAT, re.DOTALL))


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    found: dict[str, Any] = QUANTIZED
    return found


@pytest.fixture(scope="module")
def coded(example: dict[str, Any]) -> CodedMatrix:
    scale_log2 = np.array(example["scale_log2"], np.int16)
    return encode_matrix(np.array(example["q"]), scale_log2, example["log2_states"])


def hexadecimal(values: np.ndarray) -> list[str]:
    return [f"{value:08x}" for value in values]


def test_format_example_is_what_the_code_makes(example: dict[str, Any], coded: CodedMatrix) -> None:
    fields = ("rows", "cols", "log2_states", "n_classes", "raw_bits", "min_symbol")
    assert {field: getattr(coded, field) for field in fields} == {f: example[f] for f in fields}
    assert hexadecimal(coded.words) == example["words"]
    assert hexadecimal(pack_side(coded)) == example["side"]
    assert hexadecimal(coded.outliers) == example["outliers"]
    assert coded.marginals.ravel().tolist() == example["marginals"]
    assert decode_matrix(coded).tolist() == example["q"]
    assert dequantize(coded).tolist() == [[0.5, -1, 0, 0], [0, 0.25, -0.25, 750]]


def test_format_example_is_walked_through_bit_by_bit(coded: CodedMatrix) -> None:
    (table,) = decode_tables(coded.marginals, coded.log2_states)
    bits = "".join(f"{word:032b}" for word in coded.words)
    position = 0
    lines = []
    for row in range(coded.rows):
        assert position == coded.row_offsets[row]
        state = int(coded.states[row])
        for column in range(0, coded.cols, 2):
            raw = ""
            if column % 4 == 0:
                raw = bits[position : position + 4 * coded.raw_bits] + " "
                position += 4 * coded.raw_bits
            entry = int(table[state])
            nbits, base = entry & 31, entry >> 21
            before, rest = state, "| |"
            if column + 2 < coded.cols:
                field = bits[position : position + nbits]
                position += nbits
                state = base + int(field, 2)
                rest = f"| {field} | {state} |"
            lines.append(
                f"| {row} | {raw}| {column}, {column + 1} | {before} | {entry:08x} | {nbits} "
                f"| {entry >> 5 & 255} {entry >> 13 & 255} | {base} {rest}"
            )
    assert "\n".join(lines) in FORMAT


def pair_table(marginal: list[int], log2_states: int) -> list[tuple[int, int, int]]:
    """(pair, nbits, base) of each state, step by step as FORMAT.md has it and without numpy."""
    n, total = len(marginal), 1 << log2_states
    mode = marginal.index(max(marginal))
    weight = {i * n + j: marginal[i] * marginal[j] for i in range(n) for j in range(n)}
    kept = [
        pair
        for pair, w in weight.items()
        if w and (w * 32 * total >= 2**32 or pair // n == mode or pair % n == mode)
    ]
    scaled = {pair: weight[pair] << 60 - max(weight.values()).bit_length() for pair in kept}

    def shares(d: int) -> dict[int, int]:
        return {pair: min(max((scaled[pair] // d + 1) >> 1, 1), total // 2) for pair in kept}

    low, high = 0, 2**60
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(shares(middle).values()) > total else (low, middle)
    share = shares(high)
    open_to_more = [pair for pair in kept if share[pair] < total // 2]
    open_to_more.sort(key=lambda pair: (-(scaled[pair] // (2 * share[pair] + 1)), pair))
    for pair in open_to_more[: total - sum(share.values())]:
        share[pair] += 1

    owned = [(pair, x) for pair in kept for x in range(share[pair], 2 * share[pair])]
    owned.sort(key=lambda own: ((2 * own[1] + 1) * 2**48 // (2 * weight[own[0]]), own))
    states = []
    for pair, x in owned:
        nbits = log2_states - (x.bit_length() - 1)
        states.append((pair, nbits, x * 2**nbits - total))
    return states


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize(("spread", "cols"), [(0.3, 9), (2.0, 66), (25.0, 7), (90.0, 4)])
def test_format_words_suffice_to_decode(spread: float, cols: int, log2_states: int) -> None:
    rng = np.random.default_rng(cols)
    of_row = spread * np.where(np.arange(43) < 11, 4, 1)[:, None]
    q = np.rint(rng.laplace(size=(43, cols)) * of_row).astype(np.int32)
    m = encode_matrix(q, np.zeros(43, np.int16), log2_states)
    tables = [pair_table(marginal, log2_states) for marginal in m.marginals.tolist()]
    bits = "".join(f"{word:032b}" for word in m.words)
    b, n = m.raw_bits, m.n_symbols
    for row in range(m.rows):
        position, state = int(m.row_offsets[row]), int(m.states[row])
        states = tables[m.classes[row]]
        decoded = []
        for first in range(0, cols, 4):
            raw = int(bits[position : position + 4 * b] or "0", 2)
            position += 4 * b
            symbols = []
            for is_last in (False, first + 4 >= cols):
                pair, nbits, base = states[state]
                symbols += [pair // n, pair % n]
                if not is_last:
                    state = base + int(bits[position : position + nbits], 2)
                    position += nbits
            for i, symbol in enumerate(symbols):
                low = raw >> i * b & (1 << b) - 1
                decoded.append((symbol + m.min_symbol << b) + low)
        assert position == m.row_offsets[row + 1]
        for outlier in m.outliers[m.outlier_offsets[row] : m.outlier_offsets[row + 1]].tolist():
            remainder = (outlier >> 16) - (outlier >> 31 << 16)
            decoded[outlier & 0xFFFF] += remainder << b
        assert decoded[:cols] == q[row].tolist()


def test_format_example_without_loss_is_what_the_code_makes() -> None:
    bits = [[int(word, 16) for word in row.split()] for row in LOSSLESS["bits"]]
    w = np.array(bits, np.uint32).view(np.float32)
    assert w.tolist() == [[1.5, -0.75, 0, 1], [0, 0.375, 1, -1.5 * 2.0**100]]
    m = encode_lossless(w, LOSSLESS["log2_states"])
    assert (m.rows, m.cols) == (LOSSLESS["rows"], LOSSLESS["cols"])
    assert (m.anchor, m.mantissa_bits) == (LOSSLESS["anchor"], LOSSLESS["mantissa_bits"])
    assert m.exponents.min_symbol == LOSSLESS["min_symbol"]
    assert hexadecimal(m.exponents.words) == LOSSLESS["words"]
    assert hexadecimal(pack_side(m.exponents)) == LOSSLESS["side"]
    assert hexadecimal(m.exponents.outliers) == LOSSLESS["outliers"]
    assert m.exponents.marginals.ravel().tolist() == LOSSLESS["marginals"]
    assert hexadecimal(m.mantissas) == LOSSLESS["mantissas"]


@pytest.mark.parametrize("mantissa_bits", [0, 7, 10, 23])
def test_format_words_suffice_to_decode_without_loss(mantissa_bits: int) -> None:
    """The streams are those of any matrix; here it is what becomes of their integers."""
    rng = np.random.default_rng(mantissa_bits)
    bits = (rng.normal(size=(11, 70)).astype(np.float32)).view(np.uint32)
    bits &= np.uint32(0xFFFFFFFF << 23 - mantissa_bits & 0xFFFFFFFF)
    bits[3, 5], bits[4, :40], bits[5, 69] = 0xFE << 23, 1 << 31, 1 << 23
    m = encode_lossless(bits.view(np.float32), 11)
    q = decode_streams(m.exponents).tolist()
    outliers = m.exponents.outliers.tolist()
    width = 1 + m.mantissa_bits
    size = -(-70 * width // 32)
    for row in range(11):
        words = m.mantissas[row * size : (row + 1) * size]
        text = "".join(f"{word:032b}" for word in words)
        fields = [0 if n == 0 else m.anchor - n + (n > 0) for n in q[row]]
        for outlier in outliers[slice(*m.exponents.outlier_offsets[row : row + 2])]:
            assert fields[outlier & 0xFFFF] == outlier >> 16 & 255
            fields[outlier & 0xFFFF] = outlier >> 24
        for column, field in enumerate(fields):
            sign, *mantissa = text[column * width : (column + 1) * width]
            whole = f"{sign}{field:08b}{''.join(mantissa):0<23}"
            assert int(whole, 2) == bits[row, column]
    assert len(outliers) >= 2
