"""Text to token ids and back, and chat messages to a prompt, as the model's own files define it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers.decoders import DecodeStream

from engine.errors import EngineError, WeightsError
from engine.template import render_template
from model.config import ModelConfig


class Tokenizer:
    """A Hugging Face tokenizer.json and chat template; WeightsError when the former is damaged."""

    eos_ids: tuple[int, ...]  # any of them ends an answer

    def __init__(
        self, tokenizer_json: bytes, chat_template: str | None, config: ModelConfig
    ) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json.decode())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # tokenizers' own are plain Exceptions; its panics not even
            raise WeightsError(f"tokenizer.json cannot be read: {error}") from None
        top = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        if top >= config.vocab_size:
            raise WeightsError(
                f"tokenizer.json has a token {top}, but the model's vocabulary ends at "
                f"{config.vocab_size - 1}: they belong to different models"
            )
        # Settings for training batches; a prompt is neither cut nor filled up.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eos_ids = config.eos_token_ids
        self.chat_template = chat_template
        ids = {
            "bos_token": config.bos_token_id,
            "eos_token": next(iter(config.eos_token_ids), None),
        }
        # A template sees only the ones that exist, as strings.
        self._special = {
            name: token
            for name, token_id in ids.items()
            if token_id is not None and (token := self._tokenizer.id_to_token(token_id)) is not None
        }

    @property
    def vocab(self) -> dict[str, int]:
        """Every token's text and id."""
        vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocab

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it count as such.

        A BOS is added only if the model's own post-processor does so, and never to a text that
        starts with it already, as a chat prompt may. WeightsError: it contradicts itself.
        """
        bos = self._special.get("bos_token")
        starts_with_bos = bos is not None and text.startswith(bos)
        try:
            encoded = self._tokenizer.encode(text, add_special_tokens=not starts_with_bos)
        except Exception as error:  # tokenizers raises nothing more precise
            raise WeightsError(f"tokenizer.json cannot encode a text: {error}") from None
        ids: list[int] = encoded.ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one at a time."""
        return TextStream(self._tokenizer)

    def chat_prompt(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The model's chat template applied to `[{"role": ..., "content": ...}, ...]`.

        EngineError when there is no template, it is broken, or it refuses the messages.
        """
        if self.chat_template is None:
            raise EngineError(
                "this model has no chat template; give it plain text to continue instead"
            )
        try:
            # transformers always passes tools and documents, and templates test them against none.
            return render_template(
                self.chat_template,
                {
                    "messages": messages,
                    "add_generation_prompt": add_generation_prompt,
                    "tools": None,
                    "documents": None,
                    **self._special,
                },
            )
        except Exception as error:  # a template is foreign code and raises whatever it likes
            raise EngineError(
                f"the model's chat template does not accept these messages: "
                f"{' '.join(str(error).split())}"
            ) from None


class TextStream:
    """Text of ids pushed one by one; an incomplete UTF-8 character is held back."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = DecodeStream(skip_special_tokens=False)

    def push(self, token_id: int) -> str:
        return self._decoder.step(self._tokenizer, token_id) or ""
