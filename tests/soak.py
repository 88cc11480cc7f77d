"""Talks to a model for as long as it is told to, and looks at whether memory stays what it was.

    python -m tests.soak --minutes 60 [--model MODEL]

One chat, as a user has it: messages, answers stopped by Ctrl-C, other answers, taken back, saved
and loaded, contexts that fill up, a new conversation now and then, the model opened again. A line
of figures every minute. It fails if in the last fifth of the lines the process or the device holds
more than in the second fifth.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from engine import Engine, Sampling
from engine.chat.commands import loop
from engine.chat.talk import Chat

MOST_GROWTH = 32e6  # bytes: kernels that are compiled late, and what allocators keep back
TOPICS = "the sea, a lighthouse, rain, bread, prime numbers, a long winter, ravens, maps".split(
    ", "
)


def held_bytes() -> int:
    """Of the process, without pages of files, which the system may drop."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def typed(rng: random.Random, folder: Path, model: str) -> Iterator[str]:
    """The user's lines, for ever."""
    while True:
        topic = rng.choice(TOPICS)
        yield f"/set max_tokens={rng.randint(8, 64)}"
        yield f"Tell me something about {topic}."
        yield rng.choice(
            [
                f"Why {topic}?",
                "Repeat what you said, word for word.",
                "x " * 300,
                "/retry",
                "/undo",
                f"/edit Write a line about {topic}.",
                f"/save {folder}/talk",
                f"/load {folder}/talk",
                f"/copy {folder}/answer",
                f"/system Talk about {topic} only.",
                "/stats",
            ]
        )
        if rng.random() < 0.05:
            yield "/reset"
        if rng.random() < 0.02:
            yield f"/model {model}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=60, metavar="N", help="(%(default)s)")
    add("--model", default="smollm2", metavar="MODEL", help="(%(default)s)")
    add("--context", type=int, default=512, metavar="N", help="(%(default)s)")
    add("--seed", type=int, default=0, metavar="N")
    a = parser.parse_args()
    rng = random.Random(a.seed)
    sampling = Sampling(0.8, min_p=0.05, seed=a.seed)
    chat = Chat(lambda name: Engine.open(name, context=a.context), a.model, sampling)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where it runs behind a shell
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    end, n_lines, minute = 60 * a.minutes, 0, 0
    seen: list[tuple[float, int, int]] = []  # seconds, bytes of the process, of the device
    begin = time.monotonic()

    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        user = typed(rng, Path(folder), a.model)

        def read_line() -> str:
            nonlocal n_lines, minute
            signal.setitimer(signal.ITIMER_REAL, 0)
            now = time.monotonic() - begin
            seen.append((now, held_bytes(), chat.engine.device.allocated_bytes))
            if now >= 60 * minute or now >= end:
                figures = ", ".join(f"{size / 1e6:.1f} MB" for size in seen[-1][1:])
                print(f"{now / 60:.1f} min, {n_lines} lines: {figures}", file=sys.__stdout__)
                minute += 1
            if now >= end:
                raise EOFError
            n_lines += 1
            if rng.random() < 0.1:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.1, 3))
            return next(user)

        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            loop(chat, read_line)

    code = 0
    for what, column in (("process", 1), ("device", 2)):
        fifth = -(-len(seen) // 5)
        early, late = (
            statistics.median(row[column] for row in rows)
            for rows in (seen[fifth : 2 * fifth] or seen, seen[-fifth:])
        )
        print(f"{what}: {early / 1e6:.1f} MB, at the end {late / 1e6:.1f} MB")
        code |= late > early + MOST_GROWTH
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
