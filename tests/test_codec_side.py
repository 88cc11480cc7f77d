"""Side information: integers of any spread come back, and damage raises nothing but ValueError."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from codec import side

integers = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50) | st.lists(
    st.integers(0, 40), min_size=1, max_size=50
)


@given(integers, st.integers(0, 50), st.sampled_from([11, 12]))
def test_round_trip(lengths, turn, log2_states):
    lengths = np.array(lengths)
    counts = np.roll(lengths, turn)
    states = (lengths % 2**log2_states).astype(np.uint16)
    words = side.pack(lengths, states, counts, log2_states)
    assert words.dtype == np.uint32
    got = side.unpack(words, lengths.size, log2_states)
    for array, expected in zip(got, (lengths, states, counts), strict=True):
        assert np.array_equal(array, expected)


def test_cost_of_usual_rows():
    """A Gaussian of sigma 30 has log2(4.13 * 30) = 6.95 bits; bell and header add less than 0.3."""
    rng = np.random.default_rng(6)
    lengths = np.rint(rng.normal(1800, 30, 4000)).astype(np.int64)
    states = rng.integers(0, 2048, 4000).astype(np.uint16)
    words = side.pack(lengths, states, np.zeros(4000, np.int64), 11)
    assert 6.9 < words.size * 32 / 4000 - 11 < 7.25


@given(st.lists(st.integers(0, 2**32 - 1), max_size=30), st.integers(1, 60))
def test_any_words_are_decoded_or_refused(words, rows):
    try:
        lengths, states, counts = side.unpack(np.array(words, np.uint32), rows, 12)
    except ValueError:
        return
    assert lengths.shape == states.shape == counts.shape == (rows,)
    assert min(lengths.min(), counts.min()) >= 0


def test_words_left_over_are_refused():
    lengths, states = np.arange(400) * 30, np.arange(400, dtype=np.uint16)
    words = side.pack(lengths, states, lengths % 3, 12)
    with pytest.raises(ValueError, match="do not end after 40 rows"):
        side.unpack(words, 40, 12)
    with pytest.raises(ValueError, match="zero word"):
        side.unpack(np.append(words, np.uint32(0)), 400, 12)
