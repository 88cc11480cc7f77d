"""The chat itself: a model, a conversation with it, and what the user sees of them.

Answers go to stdout and nothing else does. The talk about them (model, notes, statistics, the
prompt, errors) goes to stderr.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.chat.conversation import THINK, Conversation
from engine.chat.terminal import complain, say
from engine.chat.writer import answer_writer
from engine.errors import DeviceLostError, EngineError

if TYPE_CHECKING:
    from engine import Engine, Sampling
    from engine.generate import Stats
    from engine.memory import Memory


@dataclass
class Chat:
    """One model at a time, one conversation."""

    open: Callable[[str], Engine]  # by a model's name
    name: str  # of the model, as the user gave it
    sampling: Sampling
    max_tokens: int = 1024  # of an answer
    system: str | None = None
    show_stats: bool = True
    slide: bool = False  # where the context is full, an answer goes on without its middle
    last_answer: str = ""
    last_stats: str = "no answer yet"
    conversation: Conversation = field(init=False)
    _engine: Engine | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._engine = self.open(self.name)
        tokenizer, context = self._engine.tokenizer, self._engine.context
        self.conversation = Conversation(tokenizer, context, self.max_tokens, self.system)

    @property
    def engine(self) -> Engine:
        """The model, opened again where it was given up."""
        if self._engine is None:
            # What was given up, or stopped while it was opened: its parts know each other.
            gc.collect()
            self._engine = self.open(self.name)
            self.conversation.go_on_with(self._engine.tokenizer, self._engine.context)
        return self._engine

    def give_up(self) -> None:
        """Lets go of the model, and so of its memory in time; the conversation stays."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def greet(self) -> None:
        """Says what will not be used of what was asked."""
        if self.engine.tokenizer.chat_template is None:
            say("no chat template: every message is a text that the model continues, on its own")
            if self.conversation.system:
                say("the system prompt is not used")

    def count(self, typed: str) -> str:
        """How full the context is, with what is typed."""
        talk = self.conversation
        return f"{talk.n_tokens + len(talk.tokenizer.encode(typed))} of {talk.context} tokens"

    def answer(self, message: str) -> int:
        """Streams the answer to stdout. Returns an exit code: 0, 1 (refused), 130 (interrupted)."""
        # Bytes of the terminal that are not UTF-8 arrive as lone surrogates.
        message = message.encode(errors="replace").decode()
        engine = self.engine
        try:
            prompt, n_left_out = self.conversation.prompt(message)
        except EngineError as error:  # the message's fault: the conversation goes on without it
            complain(error)
            return 1
        if n_left_out:
            say(f"the context is full: the oldest {count(n_left_out, 'turn')} left out from here")

        # Some templates open the reasoning themselves.
        out = answer_writer(engine.tokenizer.decode(prompt[-4:]).rstrip().endswith(THINK))
        stream = engine.tokenizer.stream()
        ids, text, interrupted = [], "", False
        max_tokens = self.conversation.max_tokens
        generation = engine.generate(prompt, max_tokens, self.sampling, slide=self.slide)
        try:
            for token in generation:
                piece = stream.push(token)
                ids.append(token)
                text += piece
                out.push(piece)
        except KeyboardInterrupt:
            interrupted = True
        finally:
            generation.close()
            out.close()
            if interrupted and (not text or text.endswith("\n")):
                print(file=sys.stderr)  # ends the line on which the terminal put its ^C
        self.conversation.add(message, text, ids)
        self.last_answer = text

        stats = generation.stats
        if interrupted:
            say("stopped" if text else "stopped before the answer began: the message is forgotten")
        elif stats.finish_reason == "context":
            say(f"the context of {engine.context} tokens is full: the answer ends here")
        elif stats.finish_reason == "length":
            say(f"stopped after {count(max_tokens, 'token')} (-n)")
        if stats.slides:
            say(
                f"the context was full {count(stats.slides, 'time')}: its beginning and latest "
                "half were read again, what stood between was forgotten"
            )
        self.last_stats = _figures(stats, engine.context)
        if self.show_stats:
            say(self.last_stats)
        return 130 if interrupted else 0

    def ask(self, message: str) -> None:
        """Answers, and goes on whatever became of it. A lost device is opened again, once."""
        with self.survives():
            try:
                self.answer(message)
            except DeviceLostError as error:
                complain(error)
                say("the model is opened again, then answers anew; the conversation is kept")
                self.give_up()
                self.answer(message)

    @contextmanager
    def survives(self) -> Iterator[None]:
        """An error inside is told, and a model whose device is lost is given up."""
        try:
            yield
        except EngineError as error:
            complain(error)
            if isinstance(error, DeviceLostError):
                self.give_up()


def describe(name: str, engine: Engine, memory: Memory, about: bool = False) -> str:
    """Model, adapter and sizes, in two lines."""
    bits = engine.weights.bits_per_weight(block_only=False)
    return (
        f"{name}: {engine.config.n_params / 1e6:,.1f} M parameters, {bits:.2f} bit/weight,"
        f" context {engine.context} tokens, on {engine.adapter_name}\n"
        f"memory {'about ' if about else ''}{memory}"
    )


def count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _figures(stats: Stats, context: int) -> str:
    """The statistics line of an answer."""
    n_prompt, n_answer = stats.prompt_tokens, stats.generated_tokens
    n_new = n_prompt - stats.reused_tokens
    # The first token's time is the prompt's; a stop token took time but is none of the answer's.
    n_steps = n_answer - (stats.finish_reason != "stop")
    guessed = ""
    if stats.drafted_tokens:
        guessed = f" guessed {stats.drafted_tokens}, {stats.accepted_tokens} right;"
    return (
        f"prompt {count(n_prompt, 'token')}, {n_new} new{_rate(n_new, stats.prompt_seconds)};"
        f" answer {count(n_answer, 'token')}{_rate(n_steps, stats.generate_seconds)};{guessed}"
        f" context {min(n_prompt + n_answer, context)} of {context}"
    )


def _rate(n_tokens: int, seconds: float) -> str:
    return f" at {n_tokens / seconds:.1f}/s" if seconds > 0 else ""
