"""Work spread over the processor's cores: by threads, as numpy lets go of the interpreter's lock,
or by processes, where operations are so short that threads would mostly wait for that lock.
"""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from multiprocessing import active_children, get_context
from typing import Any, TypeVar

from threadpoolctl import threadpool_limits

from engine.errors import EngineError
from engine.interrupt import uninterrupted

T = TypeVar("T")
R = TypeVar("R")

# Bytes to be worked on for which processes are worth their beginning, some 50 ms.
_WORTH_PROCESSES = 1 << 26

_forked: Callable[[Any], Any] | None = None  # in a process of `in_processes`: what it calls


def in_order(
    function: Callable[[T], R],
    items: Iterable[T],
    at_most: int | None = None,
    *,
    size: Callable[[T], int] | None = None,
    budget: int = 0,
) -> Iterator[R]:
    """map() on a thread per core or `at_most`, with no more results waiting than threads.

    With `size`, sizes of what is worked on add up to at most `budget`, if there is one, but for an
    item that alone is larger.
    """
    n_threads = _workers(at_most)
    pool = ThreadPoolExecutor(n_threads)
    yield from _in_order(pool, n_threads, function, items, size, budget)


def in_processes(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    size: Callable[[T], int],
) -> Iterator[R]:
    """`in_order`, in processes where there is work for them, by `size` in bytes; what is worked on
    takes a quarter of the machine's memory, and what waits, which should be small, as it comes:
    one large item ahead holds up no others.

    They are forked: `function` finds all as it is here, but what it changes stays there; items and
    results are pickled. Products of items of which memory holds fewer than there are cores are
    shared out among the cores. Where processes cannot be forked safely, and that is known only of
    Linux, threads do it. EngineError if one was ended, as happens when memory runs out.
    """
    n_workers, budget = min(_workers(), len(items)), memory_bytes() // 4
    if sys.platform != "linux" or n_workers < 2 or sum(map(size, items)) < _WORTH_PROCESSES:
        yield from in_order(function, items, size=size, budget=budget)
        return

    def cores(item: T) -> int:
        return max(1, _workers() // max(1, budget // max(1, size(item))))

    def size_of_work(work: tuple[T, int]) -> int:
        return size(work[0])

    works = [(item, cores(item)) for item in items]
    others = active_children()

    def end() -> None:
        for process in set(active_children()) - set(others):
            process.terminate()

    pool = ProcessPoolExecutor(
        n_workers, get_context("fork"), initializer=_begin, initargs=(function,)
    )
    try:
        yield from _in_order(pool, len(items), _call, works, size_of_work, budget, end)
    except BrokenProcessPool:
        raise EngineError(
            "a process that worked on a matrix was ended from outside, perhaps because memory ran "
            "out; free some and try again"
        ) from None


def matrix_bytes(rows: int, cols: int) -> int:
    """What it takes at most to quantize and code a matrix: some 9 bytes a weight, and float64
    copies of what belongs to its inputs.
    """
    return 9 * rows * cols + 40 * cols**2


def memory_bytes() -> int:
    """Of the machine; as good as endless where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return 1 << 62


def _workers(at_most: int | None = None) -> int:
    return min(os.cpu_count() or 1, at_most or 1 << 30)


def _begin(function: Callable[[Any], Any]) -> None:
    global _forked
    _forked = function
    threadpool_limits(1, "blas")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits


def _call(work: tuple[Any, int]) -> Any:
    """An item, and on how many cores its products are computed."""
    assert _forked is not None
    item, cores = work
    with threadpool_limits(cores, "blas") if cores > 1 else nullcontext():
        return _forked(item)


def _in_order(
    executor: Executor,
    most_waiting: int,
    function: Callable[[T], R],
    items: Iterable[T],
    size: Callable[[T], int] | None,
    budget: int,
    end: Callable[[], None] = lambda: None,
) -> Iterator[R]:
    """`end` makes an end of what has begun."""
    with executor as pool:
        waiting: deque[tuple[Future[R], int]] = deque()
        try:
            for item in items:
                own = 0 if size is None else size(item)
                while waiting:
                    worked_on = [each for each in waiting if not each[0].done()]
                    load = sum(of_item for _, of_item in worked_on)
                    fits = budget == 0 or load == 0 or load + own <= budget
                    if fits and len(waiting) <= most_waiting:
                        break
                    if len(waiting) > most_waiting or waiting[0][0].done():
                        yield waiting.popleft()[0].result()
                    else:
                        wait([future for future, _ in worked_on], return_when=FIRST_COMPLETED)
                # Within a fork Python's own hooks would take Ctrl-C, and say that they ignore it.
                with uninterrupted():
                    waiting.append((pool.submit(function, item), own))
            while waiting:
                yield waiting.popleft()[0].result()
        except BaseException:  # Ctrl-C too, and whoever wants no more: nothing is worth waiting for
            end()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
