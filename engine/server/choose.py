"""Drawing a token on the host, where the GPU's sampler does not know enough: answers that follow a
JSON schema, penalties, and answers that tell their tokens' probabilities.

The draw is the GPU's own (model/reference.py is its twin): with the same seed, the same tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLTokenizer

from engine.sampler import Sampling
from model.config import ModelConfig
from model.reference import sampling_scores

Logits = npt.NDArray[np.float32]  # (vocab_size,)

# Between two parts of a JSON text, where a model that is not sure of itself would go on for ever.
_WHITESPACE = r"( |\n {0,40})"


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, and the likeliest in its place."""

    token: int
    logprob: float  # natural logarithm, of the model's own distribution at temperature 1
    top: list[tuple[int, float]]  # the likeliest first


def token_logprob(logits: Logits, token: int, n_top: int) -> TokenLogprob:
    wide = logits.astype(np.float64)
    wide -= wide.max()
    logprobs = wide - np.log(np.exp(wide).sum())
    n_top = min(n_top, logprobs.size)
    best = np.argpartition(-logprobs, max(n_top, 1) - 1)[:n_top]
    top = sorted(((int(i), float(logprobs[i])) for i in best), key=lambda one: -one[1])
    return TokenLogprob(token, float(logprobs[token]), top)


class Grammars:
    """JSON schemas as masks over a model's tokens. ValueError from its methods says what cannot be,
    with some tokenizers anything.
    """

    def __init__(self, tokenizer_json: bytes, config: ModelConfig) -> None:
        self._problem = ""
        try:
            self._known = LLTokenizer(
                tokenizer_json.decode(),
                n_vocab=config.vocab_size,
                eos_token=list(config.eos_token_ids) or None,
            )
        except BaseException as error:  # among them its panics, which are no plain Exceptions
            self._problem = f"not with this model's tokenizer: {error}"

    @property
    def _tokens(self) -> LLTokenizer:
        if self._problem:
            raise ValueError(self._problem)
        return self._known

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, even if that is but a part of a character."""
        return self._tokens.decode_bytes([token])

    def matcher(self, schema: str) -> LLMatcher:
        """A new answer that follows a JSON schema."""
        options = {"whitespace_pattern": _WHITESPACE}
        grammar = LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]
        matcher = LLMatcher(self._tokens, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().splitlines()[0])
        return matcher


@dataclass
class Chooser:
    """Draws the tokens of one sequence; `Batch.add` takes it for its `choose`."""

    sampling: Sampling
    pos: int  # of the next token: the number of tokens before it
    n_top: int | None = None  # alternatives to note with each token; None: note nothing
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)  # token -> added to its logit
    matcher: LLMatcher | None = None
    noted: list[TokenLogprob] = field(default_factory=list)  # of each token so far
    complete: bool = False  # the answer is whole: nothing can follow
    error: str | None = None
    _counts: Counter[int] = field(default_factory=Counter)

    @property
    def needed(self) -> bool:
        """Whether the GPU's sampler would not do."""
        penalties = self.presence_penalty, self.frequency_penalty
        return self.n_top is not None or any(penalties) or bool(self.bias or self.matcher)

    def __call__(self, logits: Logits) -> int:
        token = int(np.argmax(sampling_scores(self._adjusted(logits), self.sampling, self.pos)))
        if self.n_top is not None:
            self.noted.append(token_logprob(logits, token, self.n_top))
        if self.matcher is not None:
            self.matcher.consume_token(token)
            self.complete = self.matcher.is_stopped()
            self.error = self.matcher.get_error() or None
        self._counts[token] += 1
        self.pos += 1
        return token

    def _adjusted(self, logits: Logits) -> Logits:
        """With penalties and bias as OpenAI has them, and -inf for what must not follow."""
        logits = logits.copy()
        for token, bias in self.bias.items():
            logits[token] += bias
        for token, count in self._counts.items():
            logits[token] -= self.presence_penalty + count * self.frequency_penalty
        if self.matcher is not None:
            bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: logits.size]
            logits[allowed == 0] = -np.inf
        return logits
