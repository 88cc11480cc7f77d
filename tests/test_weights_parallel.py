"""Work in order: results come as items went, and no more is in hand than was allowed."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from engine.errors import EngineError
from weights import parallel
from weights.parallel import in_order, in_processes


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


def test_results_that_were_taken_are_not_kept() -> None:
    class Result:
        pass

    results = in_order(lambda _: Result(), range(40), 2, size=lambda _: 1, budget=3)
    taken = [weakref.ref(next(results)) for _ in range(30)]
    gc.collect()
    # The last ones may still be known to who waits for their successors.
    assert not any(result() for result in taken[:20])
    assert len(list(results)) == 10


def test_a_large_item_ahead_holds_up_no_others() -> None:
    last_done = threading.Event()

    def work(size: int) -> bool:
        if size == 6:
            return last_done.wait(10)
        if size == 3:
            last_done.set()
        return True

    # Beside the 6 there is room for the 5 or for the 3.
    assert list(in_order(work, [6, 5, 3], 2, size=int, budget=11)) == [True] * 3


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr(parallel, "_WORTH_PROCESSES", 10)
    monkeypatch.setattr(parallel, "memory_bytes", lambda: 4 * 10)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
@pytest.mark.usefixtures("two_cores")
def test_processes_work_in_order_on_what_is_here() -> None:
    known = [object()]  # neither this nor a function within a function can be pickled

    def work(size: int) -> tuple[int, int, int]:
        time.sleep(0.01 * (size == 9))
        return size, len(known), os.getpid()

    found = list(in_processes(work, [9, 1, 2, 3], size=int))
    assert [(size, n) for size, n, _ in found] == [(9, 1), (1, 1), (2, 1), (3, 1)]
    processes = {process for _, _, process in found}
    assert len(processes) <= 2 and os.getpid() not in processes


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
@pytest.mark.usefixtures("two_cores")
def test_items_that_have_no_room_beside_others_get_all_cores() -> None:
    def work(size: int) -> tuple[int, set[int]]:
        found = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
        x = np.ones((300, 300), np.float32)
        return int((x @ x)[0, 0]), found

    with threadpool_limits(1, "blas"):
        found = list(in_processes(work, [10, 5, 6, 1], size=int))
    # A quarter of the memory is 10: nothing goes with the first, nor twice the third.
    assert found == [(300, {cores}) for cores in (2, 1, 2, 1)]


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("items", [[9], [1, 2, 3]], ids=["one item", "little work"])
def test_little_work_needs_no_processes(items: list[int]) -> None:
    found = list(in_processes(lambda _: os.getpid(), items, size=int))
    assert set(found) == {os.getpid()}


@pytest.mark.usefixtures("two_cores")
def test_errors_come_out_of_processes() -> None:
    def work(size: int) -> int:
        raise EngineError(f"{size} is wrong")

    with pytest.raises(EngineError, match="9 is wrong"):
        list(in_processes(work, [9, 8], size=int))


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
@pytest.mark.usefixtures("two_cores")
def test_a_process_that_is_ended_is_an_error() -> None:
    def work(size: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(EngineError, match="ended from outside"):
        list(in_processes(work, [9, 8], size=int))


ENDLESS = """
import os, signal, sys, time
from weights import parallel

def work(item):
    os.write(1, b"+")
    time.sleep(60)

if sys.argv[1] == "fork":
    os.register_at_fork(after_in_parent=lambda: signal.raise_signal(signal.SIGINT))
parallel._WORTH_PROCESSES = 1
try:
    list(parallel.in_processes(work, [1, 2, 3], size=int))
except KeyboardInterrupt:
    print("stopped", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core needs no processes")
@pytest.mark.parametrize("how", ["terminal", "kill", "fork"])
def test_ctrl_c_waits_for_no_process(how: str) -> None:
    command = [sys.executable, "-c", ENDLESS, how]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        if how != "fork":
            assert run.stdout is not None and run.stdout.read(1) == "+"
            (os.killpg if how == "terminal" else os.kill)(run.pid, signal.SIGINT)
        assert run.communicate(timeout=20)[0].lstrip("+") == "stopped\n"
