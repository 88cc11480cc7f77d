"""Side information: integers of any spread come back, and damage raises nothing but ValueError."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec import side
from codec.scale import ZERO

integers = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=150) | st.lists(
    st.integers(0, 40), min_size=1, max_size=50
)


def rows_of(lengths: np.ndarray, n_classes: int, log2_states: int, turn: int = 0) -> side.Rows:
    """Rows of so many bits; the classes have a tile each, the last one the rest."""
    classes = np.minimum(np.arange(lengths.size) // 32, n_classes - 1).astype(np.uint8)
    counts = np.roll(lengths, turn)
    scale_log2 = np.where(counts % 7 > 0, counts % 1601 - 800, ZERO)
    states = lengths % 2**log2_states
    return side.Rows(
        np.roll(classes, turn),
        lengths,
        states.astype(np.uint16),
        counts,
        scale_log2.astype(np.int16),
    )


@given(integers, st.integers(0, 50), st.sampled_from([11, 12]), st.integers(1, 8))
def test_round_trip(lengths, turn, log2_states, n_classes):
    n_classes = min(n_classes, -(-len(lengths) // 32))
    rows = rows_of(np.array(lengths), n_classes, log2_states, turn)
    words = side.pack(rows, n_classes, log2_states)
    assert words.dtype == np.uint32
    got = side.unpack(words, len(lengths), n_classes, log2_states)
    assert all(map(np.array_equal, got, rows))


def test_cost_of_usual_rows():
    """A Gaussian of sigma 30 has log2(4.13 * 30) = 6.95 bits; bell and header add less than 0.3."""
    rng = np.random.default_rng(6)
    lengths = np.rint(rng.normal(1800, 30, 4000)).astype(np.int64)
    rows = rows_of(lengths, 1, 11)._replace(
        outlier_counts=np.zeros(4000, np.int64), scale_log2=np.full(4000, -40, np.int16)
    )
    assert 6.9 < side.pack(rows, 1, 11).size * 32 / 4000 - 11 < 7.25
    # Two classes cost half of a bit more, and their lengths' distance nothing.
    classes = (np.arange(4000) % 9 > 0).astype(np.uint8)
    classes[3998:] = 1  # 444 rows of class 0, then whole tiles of it
    classes[np.flatnonzero(classes == 0)[416:]] = 1
    rows = rows._replace(classes=classes, lengths=lengths + 500 * classes.astype(np.int64))
    entropy = -np.log2(416 / 4000) * 416 / 4000 - np.log2(3584 / 4000) * 3584 / 4000
    assert 6.9 < side.pack(rows, 2, 11).size * 32 / 4000 - 11 - entropy < 7.25


@given(st.lists(st.integers(0, 2**32 - 1), max_size=30), st.integers(1, 300), st.integers(1, 8))
def test_any_words_are_decoded_or_refused(words, rows, n_classes):
    try:
        got = side.unpack(np.array(words, np.uint32), rows, n_classes, 12)
    except ValueError:
        return
    assert all(values.shape == (rows,) for values in got)
    assert min(got.lengths.min(), got.outlier_counts.min()) >= 0
    assert got.classes.max() < n_classes


def test_words_left_over_are_refused():
    words = side.pack(rows_of(np.arange(400) * 30, 1, 12), 1, 12)
    with pytest.raises(ValueError, match="do not end after 100 rows"):
        side.unpack(words, 100, 1, 12)
    with pytest.raises(ValueError, match="zero word"):
        side.unpack(np.append(words, np.uint32(0)), 400, 1, 12)


def test_classes_without_rows_are_refused():
    words = side.pack(rows_of(np.arange(400), 3, 12), 3, 12)
    with pytest.raises(ValueError, match="expected some in each"):
        side.unpack(words, 60, 3, 12)
