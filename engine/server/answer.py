"""One answer: its tokens become text, which stop strings may end, and the text goes to a client."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.server.choose import Chooser, TokenLogprob
from engine.server.schema import RequestError
from engine.tokenizer import TextStream


@dataclass(frozen=True)
class NotedToken:
    """A token, where its text begins in the answer, and how likely it was."""

    offset: int  # in characters
    logprob: TokenLogprob


@dataclass(frozen=True)
class Piece:
    """What an answer has grown by. The last one says why it ended, or carries the error."""

    index: int  # of the choice
    text: str = ""
    noted: list[NotedToken] = field(default_factory=list)
    n_tokens: int = 0  # of the answer so far
    n_reused: int = 0  # of the prompt, that others had left in the cache
    finished: str | None = None  # "stop" or "length"
    error: RequestError | None = None
    opens: bool = False  # the answer was accepted, and has nothing yet


class Answer:
    """The tokens of one sequence on their way to a client. Used by the worker's thread alone."""

    def __init__(
        self,
        index: int,
        ids: list[int],
        max_tokens: int,
        chooser: Chooser,
        stops: Sequence[str],
        stream: TextStream,
        deliver: Callable[[Piece], None],
    ) -> None:
        self.ids, self.max_tokens, self.chooser = ids, max_tokens, chooser
        self.n_tokens = self.n_reused = 0
        self.finished = False
        self._index, self._stops, self._stream, self._deliver = index, stops, stream, deliver
        self._held = ""  # text that may be the beginning of a stop string
        self._n_shown = self._n_chars = 0  # characters delivered, and in all
        self._noted: deque[NotedToken] = deque()  # of text that is not delivered yet

    def start(self) -> None:
        """Tells the client that it was accepted."""
        self._deliver(Piece(self._index, opens=True))

    def push(self, token: int) -> None:
        """One token more, which may be the last: the end of a stop string or of a JSON text."""
        chooser = self.chooser
        if chooser.error is not None:
            self.fail(RequestError(500, f"response_format: {chooser.error}", kind="server_error"))
            return
        if chooser.noted:
            self._noted.append(NotedToken(self._n_chars, chooser.noted[self.n_tokens]))
        self.n_tokens += 1
        text = self._stream.push(token)
        self._n_chars += len(text)
        self._held += text
        ends = [end for stop in self._stops if (end := self._held.find(stop)) >= 0]
        if ends:
            self._send(min(ends), "stop")
        elif chooser.complete:
            self.finish("stop")
        else:
            self._send(len(self._held) - self._undecided())

    def finish(self, reason: str) -> None:
        """Nothing more comes: what was held back is text."""
        self._send(len(self._held), reason)

    def fail(self, error: RequestError) -> None:
        self.finished = True
        self._deliver(Piece(self._index, n_tokens=self.n_tokens, error=error))

    def _undecided(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._stops):
                return length
        return 0

    def _send(self, length: int, finished: str | None = None) -> None:
        """Deliver so much of the held text; where the answer is at its end, the rest is dropped."""
        text, self._held = self._held[:length], self._held[length:]
        self._n_shown += length
        whole = finished is not None and not self._held
        noted = []
        while self._noted and (whole or self._noted[0].offset < self._n_shown):
            noted.append(self._noted.popleft())
        self.finished = finished is not None
        counts = self.n_tokens, self.n_reused
        self._deliver(Piece(self._index, text, noted, *counts, finished))
