"""What answers look like on the wire: chat and completions, whole or piece by piece."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.server.answer import NotedToken, Piece

Json = dict[str, Any]


@dataclass
class Choice:
    """One answer, put together from its pieces."""

    text: str = ""
    noted: list[NotedToken] = field(default_factory=list)
    finished: str | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.noted += piece.noted
        self.finished = piece.finished


class ChatReplies:
    """Of one request to /v1/chat/completions."""

    def __init__(self, model: str, bytes_of: Callable[[int], bytes], noted: bool) -> None:
        """`bytes_of` gives a token's bytes; `noted`: probabilities are wanted."""
        self._bytes_of, self._noted = bytes_of, noted
        self._head = _head("chatcmpl", model)

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        listed = [
            {
                "index": index,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": self._logprobs(choice.noted),
                "finish_reason": choice.finished,
            }
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "object": "chat.completion", "choices": listed, "usage": usage}

    def chunk(self, piece: Piece) -> Json | None:
        """The event of a piece, if it makes one."""
        delta = {"content": piece.text} if piece.text or piece.noted else {}
        if piece.opens:
            delta = {"role": "assistant", "content": ""}
        elif not delta and piece.finished is None:
            return None
        choice = {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece.noted) if piece.noted else None,
            "finish_reason": piece.finished,
        }
        return {**self.closing(), "choices": [choice]}

    def closing(self) -> Json:
        """The event after the last choice's end, which carries the usage."""
        return {**self._head, "object": "chat.completion.chunk", "choices": []}

    def _logprobs(self, noted: Sequence[NotedToken]) -> Json | None:
        if not self._noted:
            return None
        content = []
        for one in noted:
            top = [self._token(token, logprob) for token, logprob in one.logprob.top]
            content.append(
                {**self._token(one.logprob.token, one.logprob.logprob), "top_logprobs": top}
            )
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        text = self._bytes_of(token)
        return {"token": _text(text), "logprob": logprob, "bytes": list(text)}


class TextReplies:
    """Of one request to /v1/completions."""

    def __init__(self, model: str, bytes_of: Callable[[int], bytes], noted: bool) -> None:
        self._bytes_of, self._noted = bytes_of, noted
        self._head = {**_head("cmpl", model), "object": "text_completion"}

    def whole(self, choices: Sequence[Choice], usage: Json) -> Json:
        listed = [
            self._choice(index, choice.text, choice.noted, choice.finished)
            for index, choice in enumerate(choices)
        ]
        return {**self._head, "choices": listed, "usage": usage}

    def closing(self) -> Json:
        return {**self._head, "choices": []}

    def chunk(self, piece: Piece) -> Json | None:
        if not (piece.text or piece.noted or piece.finished):
            return None
        choice = self._choice(piece.index, piece.text, piece.noted, piece.finished)
        return {**self._head, "choices": [choice]}

    def _choice(
        self, index: int, text: str, noted: Sequence[NotedToken], finished: str | None
    ) -> Json:
        logprobs = None
        if self._noted:
            logprobs = {
                "tokens": [self._token(one.logprob.token) for one in noted],
                "token_logprobs": [one.logprob.logprob for one in noted],
                "top_logprobs": [
                    {self._token(token): logprob for token, logprob in one.logprob.top}
                    for one in noted
                ],
                "text_offset": [one.offset for one in noted],
            }
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finished}

    def _token(self, token: int) -> str:
        return _text(self._bytes_of(token))


def usage(n_prompt: int, last: Iterable[Piece]) -> Json:
    """`last`: the latest piece of each choice."""
    n_answer = n_reused = 0
    for piece in last:
        n_answer += piece.n_tokens
        n_reused += piece.n_reused
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        # Several answers to one prompt find more in the cache than the prompt is counted for.
        "prompt_tokens_details": {"cached_tokens": min(n_reused, n_prompt)},
    }


def _head(prefix: str, model: str) -> Json:
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": "",
        "created": int(time.time()),
        "model": model,
    }


def _text(token: bytes) -> str:
    """A token's text; a part of a character is shown as OpenAI does, by its bytes."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
