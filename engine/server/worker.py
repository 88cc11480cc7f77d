"""The thread that owns the engine: it takes answers in, steps them all together, and hands tokens
out. Everything else talks to it through one queue.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread

from engine.batch import Batch
from engine.batch import Sequence as Running
from engine.errors import EngineError
from engine.generate import Engine
from engine.server.answer import Answer
from engine.server.choose import Grammars
from engine.server.metrics import Metrics
from engine.server.schema import RequestError
from engine.tokenizer import Tokenizer

_RETRY_SECONDS = 1


def _failed(message: str) -> RequestError:
    return RequestError(500, message, kind="server_error")


def _unavailable(message: str) -> RequestError:
    return RequestError(503, message, kind="server_error", retry_after=_RETRY_SECONDS)


@dataclass
class _Entry:
    """What an answer is in the batch."""

    sequence: Running
    began: float


class Worker:
    """Runs answers until `close`. The engine's facts stay while it is opened anew."""

    def __init__(
        self,
        open_engine: Callable[[], Engine],
        max_sequences: int,
        max_waiting: int,
        metrics: Metrics,
        on_broken: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """`on_broken` is called from the worker's thread when the device cannot be had again."""
        self.capacity = max_sequences + max_waiting
        self.max_sequences = max_sequences
        self.tokenizer: Tokenizer
        self.grammars: Grammars
        self.context = self.vocab_size = 0
        self.about = ""
        self._open_engine, self._on_broken, self._metrics = open_engine, on_broken, metrics
        # An answer and whether it comes or leaves; None to look at the deadline.
        self._inbox: SimpleQueue[tuple[Answer, bool] | None] = SimpleQueue()
        self._entries: dict[Answer, _Entry] = {}
        self._lock = Lock()
        self._n_open = 0  # answers that were submitted and have not ended
        self._refusal: str | None = None  # why no answer is taken in, if so
        self._deadline: float | None = None  # after it, what still runs is ended
        self._opened = Event()
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        metrics.watch_sequences(
            lambda: min(self._n_open, max_sequences),
            lambda: max(0, self._n_open - max_sequences),
        )

    def start(self) -> None:
        """Returns when the engine is there; raises what opening it raises."""
        self._thread.start()
        self._opened.wait()
        if self._error is not None:
            raise self._error

    def check_room(self, n: int) -> None:
        """RequestError where n answers more would not be taken in; 0: where none ever would."""
        if (reason := self._refusal) is not None:
            raise _unavailable(reason)
        if n > self.capacity:
            raise RequestError(
                400, f"{n} answers at once are too many: there is room for {self.capacity}"
            )
        if self._n_open + n > self.capacity:
            raise RequestError(
                429,
                f"{self._n_open} answers run or wait, {self.capacity} can; try again later",
                kind="rate_limit_exceeded",
                code="rate_limit_exceeded",
                retry_after=_RETRY_SECONDS,
            )

    def submit(self, answers: Sequence[Answer]) -> None:
        """All of them or, as `check_room` says, none."""
        with self._lock:
            self.check_room(len(answers))
            self._n_open += len(answers)
            for answer in answers:
                self._inbox.put((answer, True))

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Ends those that still run: nobody reads them."""
        for answer in answers:
            self._inbox.put((answer, False))

    def close(self, seconds: float = 0.0) -> None:
        """Take nothing more in; what runs has so many seconds to end by itself. Does not wait."""
        self._deadline = time.monotonic() + seconds
        self._refuse("the server is shutting down")
        self._inbox.put(None)

    def join(self) -> None:
        """Returns when the thread has ended."""
        self._thread.join()

    def _run(self) -> None:
        """Opens the engine and serves; once more whenever the device fails."""
        while True:
            try:
                self._open()
            except BaseException as error:
                self._break(error)
                return
            try:
                self._serve()
                return
            except Exception as error:  # a driver may raise whatever it likes
                reason = f"the device failed: {' '.join(str(error).split())}"
            self._refuse(f"{reason}; it is opened again")
            # What waits goes as well: should it be to blame, it would be so once more.
            self._fail_all(_failed(reason))
            self._metrics.restarts.inc()

    def _open(self) -> None:
        self.__dict__.pop("_batch", None)
        self.__dict__.pop("_engine", None)
        gc.collect()  # the new one needs the memory of the one before
        self._engine = engine = self._open_engine()
        self._batch = Batch(engine, self.max_sequences)
        memory = engine.memory()
        self._metrics.set_memory(memory)
        if not self._opened.is_set():
            self.tokenizer, self.context = engine.tokenizer, engine.context
            self.vocab_size = engine.config.vocab_size
            self.grammars = Grammars(engine.weights.tokenizer_json, engine.config)
            self.about = (
                f"{engine.config.n_params / 1e6:,.1f} M parameters, context {engine.context} "
                f"tokens, on {engine.adapter_name}; memory {memory}"
            )
            self._opened.set()
        if self._deadline is None:
            self._refusal = None

    def _refuse(self, reason: str) -> None:
        """From now on; what was submitted before is in the inbox by then."""
        with self._lock:
            self._refusal = reason

    def _break(self, error: BaseException) -> None:
        """There is no engine any more, or never was."""
        self._refuse(str(error))
        self._fail_all(_failed(str(error)))
        if self._opened.is_set():
            self._on_broken(str(error))
        self._error = error
        self._opened.set()

    def _serve(self) -> None:
        """Until `close`, and then until the last answer or the deadline."""
        while True:
            self._take_in(wait=not self._entries)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                self._fail_all(_unavailable("the server is shutting down"))
            if self._entries:
                self._step()
            elif self._deadline is not None and self._inbox.empty():
                return

    def _take_in(self, wait: bool) -> None:
        try:
            while True:
                message = self._inbox.get(block=wait)
                wait = False
                if message is not None:
                    answer, comes = message
                    (self._add if comes else self._end)(answer)
        except Empty:
            pass

    def _add(self, answer: Answer) -> None:
        chooser = answer.chooser
        try:
            sequence = self._batch.add(
                answer.ids,
                max_tokens=answer.max_tokens,
                sampling=chooser.sampling,
                choose=chooser if chooser.needed else None,
            )
        except EngineError as error:
            answer.fail(RequestError(400, str(error)))
            self._release()
            return
        self._entries[answer] = _Entry(sequence, time.monotonic())
        self._metrics.prompt_tokens.inc(len(answer.ids))
        answer.start()

    def _step(self) -> None:
        """One pass; its tokens go to their answers, and answers at their end leave."""
        answers = {entry.sequence: answer for answer, entry in self._entries.items()}
        for sequence, token in self._batch.step():
            answer = answers[sequence]
            if not answer.finished:
                if not answer.n_tokens:
                    began = self._entries[answer].began
                    self._metrics.first_token.observe(time.monotonic() - began)
                    answer.n_reused = sequence.reused_tokens
                    self._metrics.reused_tokens.inc(sequence.reused_tokens)
                try:
                    answer.push(token)
                except EngineError as error:  # a token that its own tokenizer cannot decode
                    answer.fail(_failed(str(error)))
                self._metrics.tokens.inc()
        for answer, entry in list(self._entries.items()):
            reason = entry.sequence.finished
            if reason == "error" and not answer.finished:
                answer.fail(_failed(entry.sequence.error or "the answer failed"))
            elif reason is not None and not answer.finished:
                answer.finish(reason)
            if answer.finished:
                self._end(answer)

    def _end(self, answer: Answer) -> None:
        """It leaves the batch, if it is there."""
        entry = self._entries.pop(answer, None)
        if entry is not None:
            self._batch.remove(entry.sequence)
            self._metrics.duration.observe(time.monotonic() - entry.began)
            self._release()

    def _release(self) -> None:
        with self._lock:
            self._n_open -= 1

    def _fail_all(self, error: RequestError) -> None:
        """Of what runs and what waits."""
        while not self._inbox.empty():
            message = self._inbox.get()
            if message is not None and message[1]:
                message[0].fail(error)
                self._release()
        for answer in self._entries:
            answer.fail(error)
            self._release()
        self._entries.clear()
