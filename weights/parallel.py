"""Work spread over the processor's cores by threads: numpy lets go of the interpreter's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    at_most: int | None = None,
    *,
    size: Callable[[T], int] | None = None,
    budget: int = 0,
) -> Iterator[R]:
    """map() on a thread per core or `at_most`, with no more results waiting than threads.

    With `size`, sizes of what is worked on or waits add up to at most `budget`, but for an item
    that alone is larger.
    """
    n_threads = min(os.cpu_count() or 1, at_most or 1 << 30)
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[tuple[Future[R], int]] = deque()
        load = 0
        try:
            for item in items:
                own = 0 if size is None else size(item)
                while waiting and (len(waiting) > n_threads or load + own > budget > 0):
                    future, freed = waiting.popleft()
                    load -= freed
                    yield future.result()
                waiting.append((pool.submit(function, item), own))
                load += own
            while waiting:
                yield waiting.popleft()[0].result()
        finally:  # after an error or Ctrl-C, what has not begun is not worth waiting for
            pool.shutdown(wait=True, cancel_futures=True)
