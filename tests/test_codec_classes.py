"""Cuts between classes: the cheapest there are, and never inside a tile."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from codec.classes import MAX_UNITS, TILE, class_bits, device_order, split, units


def cost(counts, rows, ranges, symbol_bits):
    """Written from the definition, in plain numbers."""
    bits = 0.0
    for begin, end in ranges:
        inside = counts[begin:end].sum(axis=0)
        p = inside[inside > 0] / inside.sum()
        bits -= inside.sum() * (p @ np.log2(p))
        bits += symbol_bits * np.count_nonzero(counts.any(axis=0)) + 64
        bits -= rows[begin:end].sum() * np.log2(rows[begin:end].sum() / rows.sum())
    return bits


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("size", [3, 300, 30000])
def test_no_other_cuts_are_cheaper(size, most):
    rng = np.random.default_rng(1)
    n_units = 7
    p = rng.dirichlet(np.full(6, 2.0), n_units)
    counts = np.array([rng.multinomial(size, of_unit) for of_unit in p]).astype(float)
    rows = np.array([64, 64, 64, 64, 64, 64, 7])
    found, saved = split([class_bits(counts, rows, 16)], most)
    got = [(first, end) for first, end, _ in found]
    assert [begin for begin, _ in got] == [0, *(end for _, end in got[:-1])]
    assert got[-1][1] == n_units
    every = [
        list(pairwise((0, *cuts, n_units)))
        for n_cuts in range(most)
        for cuts in combinations(range(1, n_units), n_cuts)
    ]
    least = min(cost(counts, rows, ranges, 16) for ranges in every)
    assert cost(counts, rows, got, 16) == pytest.approx(least, rel=1e-12)
    assert cost(counts, rows, [(0, n_units)], 16) - saved == pytest.approx(least, rel=1e-12)
    assert (len(got) > 1) == (size > 300 and most > 1)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_no_other_kinds_are_cheaper(most):
    """Each range of one of two kinds, none of the first after one of the second."""
    rng = np.random.default_rng(most)
    length = np.arange(7) - np.arange(6)[:, None]
    kinds = np.where(length > 0, rng.random((2, 6, 7)) * np.maximum(length, 0) ** 1.5, np.inf)
    got, saved = split(list(kinds), most)
    totals = {}
    for n_cuts in range(most):
        for cuts in combinations(range(1, 6), n_cuts):
            ranges = list(pairwise((0, *cuts, 6)))
            for n_first in range(len(ranges) + 1):
                of_kind = [int(i >= n_first) for i in range(len(ranges))]
                key = tuple((*r, kind) for r, kind in zip(ranges, of_kind, strict=True))
                totals[key] = sum(kinds[kind, first, end] for first, end, kind in key)
    assert totals[tuple(map(tuple, got))] == min(totals.values())
    one = min(total for key, total in totals.items() if len(key) == 1)
    assert saved == pytest.approx(one - min(totals.values()))


@pytest.mark.parametrize("rows", [1, 32, 33, 2048, 2049, 49152])
def test_units_are_whole_tiles(rows):
    assert units(rows).sum() == rows
    assert not (units(rows)[:-1] % TILE).any()
    assert len(units(rows)) <= MAX_UNITS
    assert len(units(rows, 8)) <= 8


def test_device_order_is_by_class_then_by_row():
    classes = np.array([2, 0, 1, 0, 2, 1], np.uint8)
    assert device_order(classes).tolist() == [1, 3, 2, 5, 0, 4]
