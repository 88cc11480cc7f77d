"""Ctrl-C while something of the GPU is made."""

from __future__ import annotations

import signal
import threading

import pytest

from engine.interrupt import uninterrupted


def test_ctrl_c_comes_at_the_end() -> None:
    before = signal.getsignal(signal.SIGINT)
    went_on = False
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        with uninterrupted():  # as when a kernel's parameters are uploaded
            signal.raise_signal(signal.SIGINT)
        went_on = True
    assert went_on and signal.getsignal(signal.SIGINT) is before
    with uninterrupted():
        pass


def test_a_failure_inside_is_told() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="inside"), uninterrupted():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_have_no_ctrl_c() -> None:
    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
