"""Makes codec_words.json: small matrices in code, bit by bit, with 2^11 and with 2^12 states.

    python tests/golden/make_codec_words.py

The format's promise: version 5 files hold exactly these words and rebuild exactly these tables. So
if the encoder improves, the words may be made anew, but what `tables` and `words` say must go on
being read as `q`.
"""

import json
from pathlib import Path

import numpy as np

from codec.matrix import CodedMatrix, encode_matrix
from codec.table import decode_tables

GOLDEN = Path(__file__).parent / "codec_words.json"


def golden_matrix() -> np.ndarray:
    """q (40, 37): bells from a fixed sequence, every fifth row wider, with two outliers."""
    sequence, x = [], 1
    for _ in range(40 * 37 * 4):
        x = x * 1103515245 + 12345 & 0x7FFFFFFF  # the example generator of the C standard
        sequence.append((x >> 16) % 11 - 5)
    q = np.array(sequence).reshape(4, 40, 37).sum(axis=0)
    q[::5] *= 7
    q[1, 36], q[3, 0] = 1000, -77
    return q


def golden_sparse_matrix() -> np.ndarray:
    """q (40, 37): the same in steps so large that most are zeros: coded in groups of four."""
    q = golden_matrix()
    return np.sign(q) * (np.abs(q) // 30)


def to_record(m: CodedMatrix) -> dict[str, object]:
    return {
        "log2_states": m.log2_states,
        "group": m.group,
        "raw_bits": m.raw_bits,
        "n_narrow": m.n_narrow,
        "narrow_raw_bits": m.narrow_raw_bits,
        "min_symbol": m.min_symbol,
        "marginals": m.marginals.tolist(),
        "classes": m.classes.tolist(),
        "row_offsets": m.row_offsets.tolist(),
        "states": m.states.tolist(),
        "outlier_offsets": m.outlier_offsets.tolist(),
        "outliers": m.outliers.tolist(),
        "words": m.words.astype(">u4").tobytes().hex(),
        "tables": decode_tables(m.marginals, m.log2_states, m.group).astype(">u4").tobytes().hex(),
    }


if __name__ == "__main__":
    records = [
        {"q": q.tolist(), **to_record(encode_matrix(q, np.zeros(40, np.int16), log2_states))}
        for q in (golden_matrix(), golden_sparse_matrix())
        for log2_states in (11, 12)
    ]
    GOLDEN.write_text(json.dumps(records) + "\n")
