"""What was said, and the prompt that a new message makes of it. Knows a tokenizer, no engine."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.errors import EngineError

if TYPE_CHECKING:
    from engine.tokenizer import Tokenizer

THINK, END_OF_THINK = "<think>", "</think>"  # how models mark what they say to themselves


@dataclass
class Conversation:
    """The turns so far.

    Without a chat template there are no turns: every message is a text to continue, on its own.
    """

    tokenizer: Tokenizer
    context: int  # tokens that prompt and answer share
    max_tokens: int  # of an answer
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # (message, answer)
    # All the model read and said up to its last answer, as text and as the very ids: see _encode.
    _read: tuple[str, list[int]] | None = None

    def prompt(self, message: str) -> tuple[list[int], int]:
        """Token ids of the prompt for `message`, and how many turns were forgotten to make room.

        EngineError, with nothing forgotten, when the message alone does not fit.
        """
        ids = self._encode(self.turns, message)[1]
        limit = self.context - min(self.max_tokens, self.context // 4)
        if len(ids) <= limit:
            return ids, 0
        n_alone = len(self._encode([], message)[1])
        if n_alone >= self.context:
            raise EngineError(
                f"not sent: the message makes {n_alone} tokens, the context holds {self.context}"
            )
        n_turns = len(self.turns)
        while self.turns and len(ids) > limit:
            # The older half at once: one by one, every message from here on would move the start
            # of the prompt, and the engine's cache would be of no use any more.
            del self.turns[: (len(self.turns) + 1) // 2]
            ids = self._encode(self.turns, message)[1]
        return ids, n_turns - len(self.turns)

    @property
    def n_tokens(self) -> int:
        """Tokens of all that was said, up to the last answer."""
        return len(self._read[1]) if self._read and self.turns else 0

    def undo(self) -> str | None:
        """Forgets the last turn; returns its message, None if there is none."""
        if not self.turns:
            return None
        message, _ = self.turns.pop()
        self._read_again()
        return message

    def add(self, message: str, answer: str, answer_ids: list[int]) -> None:
        """Keeps a turn. One without an answer is forgotten: it would teach the model silence."""
        if self.tokenizer.chat_template is not None and answer:
            text, ids = self._encode(self.turns, message)
            self._read = text + answer, ids + answer_ids
            self.turns.append((message, answer))

    def go_on_with(self, tokenizer: Tokenizer, context: int) -> None:
        """Another model takes over: it will read all that was said in tokens of its own."""
        if tokenizer is not self.tokenizer:
            self.tokenizer, self.context = tokenizer, context
            self._read_again()

    def to_json(self) -> str:
        return json.dumps({"system": self.system, "turns": self.turns, "read": self._read})

    def from_json(self, text: str) -> None:
        """Take the place of this conversation; EngineError, with nothing changed, if it is none."""
        try:
            saved = json.loads(text)
            system, read = saved["system"], saved["read"]
            turns = [(str(message), str(answer)) for message, answer in saved["turns"]]
            read = read and (str(read[0]), [int(token) for token in read[1]])
        except (ValueError, TypeError, LookupError):
            raise EngineError(
                "a session, but of no chat: it was saved by another program"
            ) from None
        self.system, self.turns, self._read = system, turns, read

    def _read_again(self) -> None:
        """What a model has read that only ever saw these turns."""
        self._read = None
        if self.turns and self.tokenizer.chat_template is not None:
            *before, (message, answer) = self.turns
            text, ids = self._encode(before, message)
            self._read = text + answer, ids + self.tokenizer.encode(answer)

    def _encode(self, turns: list[tuple[str, str]], message: str) -> tuple[str, list[int]]:
        """Prompt of `turns` and `message` as (text, token ids).

        An answer, tokenized again, need not give the tokens that it was generated as, and those
        are what the engine's cache holds: a prompt that continues what was read keeps them.
        """
        if self.tokenizer.chat_template is None:
            return message, self.tokenizer.encode(message)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": message})
        text = self.tokenizer.chat_prompt(messages)
        ids = self.tokenizer.encode(text)
        if self._read is not None:
            again = self.tokenizer.encode(self._read[0])
            if ids[: len(again)] == again:
                ids = self._read[1] + ids[len(again) :]
        return text, ids
