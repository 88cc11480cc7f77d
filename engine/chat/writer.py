"""An answer's way to stdout, piece by piece: as it is, or on a terminal as Markdown."""

from __future__ import annotations

import os
import sys
from typing import Protocol

from engine.chat.terminal import CONTROLS, is_plain


class Writer(Protocol):
    """Where an answer goes."""

    def push(self, piece: str) -> None: ...

    def close(self) -> None: ...


class PlainWriter:
    """Text as it is; on a terminal without control characters. It ends with a whole line."""

    def __init__(self) -> None:
        self._tty = sys.stdout.isatty()
        self._ends_line = True

    def push(self, piece: str) -> None:
        print(piece.translate(CONTROLS) if self._tty else piece, end="", flush=True)
        self._ends_line = piece.endswith("\n") if piece else self._ends_line

    def close(self) -> None:
        if not self._ends_line:
            print(flush=True)


class MarkdownWriter:
    """Markdown, code highlighted, reasoning dim."""

    def __init__(self, thinking: bool) -> None:
        from engine.chat.markdown import MarkdownStream

        self._stream = MarkdownStream(sys.stdout, thinking)

    def push(self, piece: str) -> None:
        self._stream.push(piece.translate(CONTROLS))

    def close(self) -> None:
        self._stream.close()


def answer_writer(thinking: bool = False) -> Writer:
    """`thinking`: the answer begins within reasoning that its prompt has opened."""
    plain = is_plain() or not sys.stdout.isatty() or os.environ.get("NO_COLOR")
    return PlainWriter() if plain else MarkdownWriter(thinking)
