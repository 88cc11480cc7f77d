"""Work in order: results come as items went, and no more is in hand than was allowed."""

from __future__ import annotations

import threading
import time

import pytest

from weights.parallel import in_order


@pytest.mark.parametrize("budget", [0, 10, 13, 100])
def test_in_order_keeps_to_its_budget(budget: int) -> None:
    sizes = [3, 7, 12, 1, 1, 1, 30, 2, 5, 5, 5, 8]
    lock, load, overlaps = threading.Lock(), 0, []

    def work(size: int) -> int:
        nonlocal load
        with lock:
            load += size
            overlaps.append((load, size))
        time.sleep(0.002)
        with lock:
            load -= size
        return -size

    size = None if budget == 0 else int
    found = list(in_order(work, sizes, 4, size=size, budget=budget))
    assert found == [-size for size in sizes]
    if budget:
        assert all(together <= max(budget, alone) for together, alone in overlaps)
