"""How a matrix becomes integers: large ones part by part."""

from __future__ import annotations

import numpy as np
import pytest

from codec.whiten import inverse_factor, quantize_whitened
from weights import parallel, quantizers
from weights.quantizers import quantize_by_rows


@pytest.mark.parametrize("processes", [False, True])
def test_parts_of_rows_are_quantized_as_the_whole(
    monkeypatch: pytest.MonkeyPatch, processes: bool
) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 130)) @ rng.normal(size=(130, 130))
    u = inverse_factor(x.T @ x / 300)
    w = rng.laplace(size=(97, 130)).astype(np.float32)
    steps = rng.uniform(0.3, 2, 97).astype(np.float32)
    whole = quantize_by_rows(w, u, steps)
    assert np.array_equal(whole, quantize_whitened(w, u, steps))

    monkeypatch.setattr(quantizers, "_LARGE", w.size)
    monkeypatch.setattr(quantizers, "_PART", 20)
    if processes:
        monkeypatch.setattr(parallel, "_WORTH_PROCESSES", 1)
        monkeypatch.setattr("os.cpu_count", lambda: 3)
    parts = quantize_by_rows(w, u, steps)
    # Products of other shapes may be rounded otherwise, and few weights are at a boundary.
    assert np.mean(parts != whole) < 1e-3
    # Prices are those of the whole; by a part's own more than one in a hundred is another.
    alone = np.concatenate(
        [quantize_whitened(w[i : i + 20], u, steps[i : i + 20]) for i in range(0, 97, 20)]
    )
    assert np.mean(alone != whole) > 0.01

    pruned = quantize_by_rows(w, u, steps, 0.5)
    assert 0.5 <= np.mean(pruned == 0) < np.mean(quantize_whitened(w, u, steps, 0.8) == 0)
