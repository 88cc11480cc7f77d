"""FORMAT.md: its example is what the code makes, and its words suffice to decode a matrix."""

from __future__ import annotations

import json
import re
from itertools import product
from math import prod
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
from codec.side import pack_outliers
from codec.table import decode_tables

FORMAT = (Path(weights.__file__).parent / "FORMAT.md").read_text("utf-8")
QUANTIZED, SPARSE, LOSSLESS = map(json.loads, re.findall(r"```json\n(.*?)```", FORMAT, re.DOTALL))


@pytest.fixture(scope="module", params=[QUANTIZED, SPARSE], ids=["pairs", "groups of four"])
def example(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.fixture(scope="module")
def coded(example: dict[str, Any]) -> CodedMatrix:
    scale_log2 = np.array(example["scale_log2"], np.int16)
    return encode_matrix(np.array(example["q"]), scale_log2, example["log2_states"])


def hexadecimal(values: np.ndarray) -> list[str]:
    return [f"{value:08x}" for value in values]


def test_format_example_is_what_the_code_makes(example: dict[str, Any], coded: CodedMatrix) -> None:
    fields = (
        "rows",
        "cols",
        "log2_states",
        "n_classes",
        "group",
        "raw_bits",
        "n_narrow",
        "narrow_raw_bits",
        "min_symbol",
    )
    assert {field: getattr(coded, field) for field in fields} == {f: example[f] for f in fields}
    assert hexadecimal(coded.words) == example["words"]
    assert hexadecimal(pack_side(coded)) == example["side"]
    assert hexadecimal(pack_outliers(coded.outliers, coded.cols)) == example["outliers"]
    assert coded.marginals.ravel().tolist() == example["marginals"]
    assert decode_matrix(coded).tolist() == example["q"]


def test_format_example_has_these_weights() -> None:
    m = encode_matrix(np.array(QUANTIZED["q"]), np.array(QUANTIZED["scale_log2"], np.int16), 11)
    assert dequantize(m).tolist() == [[0.5, -1, 0, 0], [0, 0.25, -0.25, 750]]


def test_format_example_is_walked_through_bit_by_bit(coded: CodedMatrix) -> None:
    (table,) = decode_tables(coded.marginals, coded.log2_states, coded.group)
    bits = "".join(f"{word:032b}" for word in coded.words)
    position = 0
    lines = []
    for row in range(coded.rows):
        assert position == coded.row_offsets[row]
        state = int(coded.states[row])
        for column in range(0, coded.cols, coded.group):
            raw = ""
            if column % 4 == 0 and coded.raw_bits:
                raw = bits[position : position + 4 * coded.raw_bits] + " "
                position += 4 * coded.raw_bits
            entry = int(table[state])
            nbits, base = 32 - (entry >> 16 & 31), entry >> 21
            before, rest = state, "| |"
            if column + coded.group < coded.cols:
                field = bits[position : position + nbits]
                position += nbits
                state = base + int(field, 2)
                rest = f"| {field} | {state} |"
            columns = range(column, column + coded.group)
            width = 16 // coded.group
            symbols = [entry >> width * i & 2**width - 1 for i in range(coded.group)]
            lines.append(
                f"| {row} | {raw}| {', '.join(map(str, columns))} | {before} | {entry:08x} "
                f"| {nbits} | {' '.join(map(str, symbols))} | {base} {rest}"
            )
    assert "\n".join(lines) in FORMAT


def group_table(
    marginal: list[int], log2_states: int, group: int
) -> list[tuple[tuple[int, ...], int, int]]:
    """(symbols, nbits, base) of each state, step by step as FORMAT.md has it and without numpy."""
    total = 1 << log2_states
    mode = marginal.index(max(marginal))
    weight = {}
    for symbols in product(range(len(marginal)), repeat=group):
        w = prod(marginal[s] for s in symbols)
        weight[symbols] = (w >> 32 or min(w, 1)) if group == 4 else w
    t = 2 ** (27 - log2_states)
    while True:
        kept = [
            symbols
            for symbols, w in weight.items()
            if w >= t or (w and sum(s != mode for s in symbols) <= 1)
        ]
        if len(kept) <= total // 2:
            break
        t *= 2
    scaled = {own: weight[own] << 60 - max(weight.values()).bit_length() for own in kept}

    def shares(d: int) -> dict[tuple[int, ...], int]:
        return {own: min(max((scaled[own] // d + 1) >> 1, 1), total // 2) for own in kept}

    low, high = 0, 2**60
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if sum(shares(middle).values()) > total else (low, middle)
    share = shares(high)
    open_to_more = [own for own in kept if share[own] < total // 2]
    open_to_more.sort(key=lambda own: (-(scaled[own] // (2 * share[own] + 1)), own))
    for own in open_to_more[: total - sum(share.values())]:
        share[own] += 1

    owned = [(own, x) for own in kept for x in range(share[own], 2 * share[own])]
    owned.sort(key=lambda state: ((2 * state[1] + 1) * 2**48 // (2 * weight[state[0]]), state))
    states = []
    for symbols, x in owned:
        nbits = log2_states - (x.bit_length() - 1)
        states.append((symbols, nbits, x * 2**nbits - total))
    return states


@pytest.mark.parametrize("log2_states", [11, 12])
@pytest.mark.parametrize(
    ("spread", "cols", "group"),
    [(0.07, 59, 4), (0.5, 9, 2), (2.0, 66, 2), (25.0, 7, 2), (90.0, 4, 2)],
)
def test_format_words_suffice_to_decode(
    spread: float, cols: int, group: int, log2_states: int
) -> None:
    rng = np.random.default_rng(cols)
    of_row = spread * np.where(np.arange(43) < 11, 4, 1)[:, None]
    q = np.rint(rng.laplace(size=(43, cols)) * of_row).astype(np.int32)
    m = encode_matrix(q, np.zeros(43, np.int16), log2_states)
    assert m.group == group
    tables = [group_table(marginal, log2_states, group) for marginal in m.marginals.tolist()]
    bits = "".join(f"{word:032b}" for word in m.words)
    for row in range(m.rows):
        b = m.narrow_raw_bits if m.classes[row] < m.n_narrow else m.raw_bits
        position, state = int(m.row_offsets[row]), int(m.states[row])
        states = tables[m.classes[row]]
        decoded = []
        for first in range(0, cols, 4):
            raw = int(bits[position : position + 4 * b] or "0", 2)
            position += 4 * b
            symbols: list[int] = []
            while len(symbols) < 4:
                of_group, nbits, base = states[state]
                symbols += of_group
                if first + len(symbols) < cols + -cols % 4:
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
    outliers = pack_outliers(m.exponents.outliers, m.exponents.cols)
    assert hexadecimal(outliers) == LOSSLESS["outliers"]
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
