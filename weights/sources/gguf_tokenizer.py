"""tokenizer.json rebuilt from a GGUF file, which only names its pre-tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import WeightsError

# Kinds of tokens that are never made of other tokens (`gguf.TokenType`).
_CONTROL, _USER_DEFINED = 3, 4

# The word patterns of Llama 3 and Qwen 2, from the tokenizer.json files published with them.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(words: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), byte_level])


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_byte_level() -> pre_tokenizers.PreTokenizer:
    # Digits come first: "  7" must not become one word before its digit is split off.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": _byte_level,
    "smollm": _digits_byte_level,
    "llama-bpe": lambda: _split(_LLAMA3_WORDS),
    "qwen2": lambda: _split(_QWEN2_WORDS),
}


def build_tokenizer_json(path: Path, get: Callable[..., Any]) -> bytes:
    """`get(key, default=None)` hands out the file's values.

    WeightsError for a kind of tokenizer not known here: a guess would mean other tokens than the
    model was trained with.
    """
    kind = get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise WeightsError(
            f"{path}: tokenizer of kind {kind!r}, expected 'gpt2' (byte-level BPE); "
            f"use the Hugging Face folder of this model, which brings its own tokenizer.json"
        )
    pre = get("tokenizer.ggml.pre")
    if pre not in _PRE_TOKENIZERS:
        raise WeightsError(
            f"{path}: pre-tokenizer {pre!r}, expected one of {', '.join(_PRE_TOKENIZERS)}; "
            f"use the Hugging Face folder of this model, which brings its own tokenizer.json"
        )
    tokens, types, merges = (
        get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")
    )
    if not tokens or not types or merges is None or len(types) != len(tokens):
        raise WeightsError(
            f"{path}: tokenizer.ggml.tokens, .token_type and .merges are missing or do not match"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise WeightsError(f"{path}: a token occurs twice in tokenizer.ggml.tokens")

    try:
        bpe = models.BPE(
            vocab=vocab,
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre == "llama-bpe",  # Llama 3 takes a word that is a token as it is
        )
    except Exception as error:  # tokenizers raises nothing more precise
        raise WeightsError(
            f"{path}: tokenizer.ggml.merges do not fit the tokens ({error})"
        ) from None
    tokenizer = tokenizers.Tokenizer(bpe)
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        (token, type_)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(
        [AddedToken(token, special=type_ == _CONTROL, normalized=False) for token, type_ in added]
    )
    # llama.cpp's defaults: Llama 3 starts every text with BOS, others only when the file says so.
    if get("tokenizer.ggml.add_bos_token", pre == "llama-bpe"):
        bos_id = get("tokenizer.ggml.bos_token_id")
        if not isinstance(bos_id, int) or not 0 <= bos_id < len(tokens):
            raise WeightsError(
                f"{path}: texts start with BOS, but tokenizer.ggml.bos_token_id is {bos_id!r}"
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["bos", "$A"],
            special_tokens=[{"id": "bos", "ids": [bos_id], "tokens": [tokens[bos_id]]}],
        )
    return tokenizer.to_str().encode()
