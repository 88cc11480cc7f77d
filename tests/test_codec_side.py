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


outliers = st.lists(st.integers(0, 2**32 - 1), max_size=60)


@given(outliers, st.integers(1, 2**16 - 1))
def test_outliers_come_back(values, cols):
    given_ = np.array([(v >> 16 << 16) | (v & 0xFFFF) % cols for v in values], np.uint32)
    words = side.pack_outliers(given_, cols)
    assert words.dtype == np.uint32 and (values or not words.size)
    assert np.array_equal(side.unpack_outliers(words, len(values), cols), given_)


def test_cost_of_usual_outliers():
    """Columns take log2(cols), signs 1; geometric sizes 3.1, coded by digits half a bit more."""
    rng = np.random.default_rng(7)
    half = (rng.geometric(0.3, 5000) * rng.choice([-1, 1], 5000)).astype(np.int16).view(np.uint16)
    given_ = rng.integers(0, 1536, 5000).astype(np.uint32) | half.astype(np.uint32) << 16
    assert side.pack_outliers(given_, 1536).size * 32 / 5000 < np.log2(1536) + 1 + 3.1 + 0.5


@given(outliers, st.integers(0, 50), st.integers(1, 300))
def test_any_words_are_outliers_or_refused(words, n, cols):
    try:
        got = side.unpack_outliers(np.array(words, np.uint32), n, cols)
    except ValueError:
        return
    assert got.shape == (n,) and (got & 0xFFFF < max(2, cols)).all()


def test_outliers_left_over_are_refused():
    words = side.pack_outliers(np.arange(400, dtype=np.uint32) << 16, 500)
    with pytest.raises(ValueError, match="do not end after 400"):
        side.unpack_outliers(np.append(words[:1], words), 400, 500)
    with pytest.raises(ValueError, match="digits"):
        side.unpack_outliers(words, 100, 500)
    with pytest.raises(ValueError, match="words for none"):
        side.unpack_outliers(words, 0, 500)
