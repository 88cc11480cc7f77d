"""Ctrl-C at the right moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside takes effect at the end.

    For what makes objects of the GPU, a device first of all: from within such a call Python raises
    once it is over, and what it has made is then nobody's; it would never be freed, nor the device
    that it belongs to. Commands that are recorded and not submitted keep all that they use. And
    Python's locks may stay locked where an exception meets them (threading.Condition.__enter__).
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield  # nothing would be raised here
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if held:
            handler(*held[0])
