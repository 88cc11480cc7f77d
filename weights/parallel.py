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
    function: Callable[[T], R], items: Iterable[T], at_most: int | None = None
) -> Iterator[R]:
    """map() on a thread per core or `at_most`, with no more results waiting than threads."""
    n_threads = min(os.cpu_count() or 1, at_most or 1 << 30)
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > n_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # after an error or Ctrl-C, what has not begun is not worth waiting for
            pool.shutdown(wait=True, cancel_futures=True)
