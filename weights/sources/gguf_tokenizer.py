"""tokenizer.json rebuilt from a GGUF file, which has tokens and only names how words are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import WeightsError

# Kinds of tokens (`gguf.TokenType`): only normal ones are made of other tokens.
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4

# Word patterns, from the tokenizer.json files published with Llama 3, Qwen 2 and Mistral Nemo;
# GPT-2 has its own in the library.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_WORDS = _LLAMA3_WORDS.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN_WORDS = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What llama.cpp cuts by, one after the other, where a file says nothing better.
_DEFAULT_WORDS = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2_WORDS, r"\p{N}+", r"[0-9][0-9][0-9]")

_PREFIX = "\u2581"  # sentencepiece's space


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cut by each pattern in turn; what none matches stays a piece."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, byte_level])


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _digits_byte_level() -> pre_tokenizers.PreTokenizer:
    # Digits come first: "  7" must not become one word before its digit is split off.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "default": lambda: _split(*_DEFAULT_WORDS),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais"), _byte_level),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _digits_byte_level,
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx", "falcon3", "pixtral"),
        lambda: _split(_LLAMA3_WORDS),
    ),
    **dict.fromkeys(
        ("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez"), lambda: _split(_QWEN2_WORDS)
    ),
    "tekken": lambda: _split(_TEKKEN_WORDS),
}
# A word that is a token is taken as it is, whether merges lead to it or not.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")
_STARTS_WITH_BOS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken")


def build_tokenizer_json(path: Path, get: Callable[..., Any]) -> bytes:
    """`get(key, default=None)` hands out the file's values.

    WeightsError for a kind of tokenizer not known here: a guess would mean other tokens than the
    model was trained with.
    """
    kind = get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise WeightsError(
            f"{path}: tokenizer of kind {kind!r}, expected 'gpt2' (byte-level BPE) or 'llama' "
            f"(sentencepiece); {_FOLDER_HELPS}"
        )
    tokens, types = (get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if not isinstance(tokens, list) or not isinstance(types, list) or len(types) != len(tokens):
        raise WeightsError(
            f"{path}: tokenizer.ggml.tokens and .token_type are missing or do not match"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise WeightsError(f"{path}: a token occurs twice in tokenizer.ggml.tokens")

    build = _byte_level_bpe if kind == "gpt2" else _sentencepiece
    tokenizer, starts_with_bos = build(path, get, vocab, types)
    added = [
        AddedToken(token, special=type_ == _CONTROL, normalized=False)
        for token, type_ in zip(tokens, types, strict=True)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    if get("tokenizer.ggml.add_bos_token", starts_with_bos):
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


_FOLDER_HELPS = "use the Hugging Face folder of this model, which brings its own tokenizer.json"


def _byte_level_bpe(
    path: Path, get: Callable[..., Any], vocab: dict[str, int], types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether its texts start with BOS if the file does not say."""
    pre = get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise WeightsError(
            f"{path}: pre-tokenizer {pre!r}, expected one of {', '.join(_PRE_TOKENIZERS)}; "
            f"{_FOLDER_HELPS}"
        )
    merges = get("tokenizer.ggml.merges")
    if merges is None:
        raise WeightsError(f"{path}: tokenizer.ggml.merges are missing")
    try:
        bpe = models.BPE(
            vocab=vocab,
            merges=[tuple(merge.split(" ", 1)) for merge in merges],
            ignore_merges=pre in _WHOLE_WORDS,
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
    return tokenizer, pre in _STARTS_WITH_BOS


def _sentencepiece(
    path: Path, get: Callable[..., Any], vocab: dict[str, int], types: list[int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """Llama 2's kind: the best-scored neighbours are merged first; unknown characters are bytes."""
    scores = get("tokenizer.ggml.scores")
    unknown = get("tokenizer.ggml.unknown_token_id", 0)
    if not isinstance(scores, list) or len(scores) != len(vocab):
        raise WeightsError(f"{path}: tokenizer.ggml.scores are missing or do not match the tokens")
    if not isinstance(unknown, int) or not 0 <= unknown < len(vocab):
        raise WeightsError(f"{path}: tokenizer.ggml.unknown_token_id is {unknown!r}")
    merges: list[tuple[float, str, str]] = []
    for token, score, type_ in zip(vocab, scores, types, strict=True):
        if type_ == _NORMAL:
            for i in range(1, len(token)):
                left, right = token[:i], token[i:]
                if left in vocab and right in vocab:
                    merges.append((-score, left, right))
    # Of those that make the same token the longer left side first, as transformers has it.
    merges.sort(key=lambda merge: (merge[0], -len(merge[1])))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[(left, right) for _, left, right in merges],
            unk_token=list(vocab)[unknown],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _PREFIX)
    decoding = [decoders.Replace(_PREFIX, " "), decoders.ByteFallback(), decoders.Fuse()]
    if get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_PREFIX), spaces])
        tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer, True
